"""HTTP below the routes: who may ask, how long a body may be, and noticing at once when a client hangs up."""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import traceback
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from semiopen.host.serving.errors import ApiError, as_api_error, timed_out

T = TypeVar("T")
logger = logging.getLogger("semiopen.serving")

OPEN_PATHS = frozenset({"/health", "/live", "/metrics", "/version"})  # for probes, which have no key
KEY_DIGEST = "semiopen.key"  # in a request's scope: digest of the API key that it was let in with
BODY_SECONDS = 60.0  # for a client to send its request
START_SECONDS = 2.0  # a stream's headers wait no longer for its first event


class HungUp(Exception):
    """The client is gone; nobody reads the answer."""


class Guard:
    """Around the whole application: checks the API key, and makes answers of all that went wrong.

    It is outermost, so that no error reaches a server that would write its message, and with it a prompt, to a log.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [_digest(key) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, through the application or with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if self._keys and scope["path"] not in OPEN_PATHS and not self._allowed(scope):
                raise ApiError(
                    401,
                    "Give a valid API key as 'Authorization: Bearer KEY'.",
                    code="invalid_api_key",
                    kind="authentication_error",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            await self._app(scope, receive, watched)
        except HungUp:
            pass
        except Exception as error:
            log_failure(error)
            if not started:
                await error_response(error)(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # Each key is compared, and in constant time, so that nobody learns a key or its place from the time it takes.
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        scope[KEY_DIGEST] = digest
        return scheme.lower() == b"bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def log_failure(error: BaseException) -> None:
    """Write where an unexpected error came from, without its message, which may hold a prompt."""
    answer = as_api_error(error)
    if answer.status == 500:
        frames = "".join(traceback.format_tb(error.__traceback__))
        logger.error("A request failed with %s:\n%s", type(error).__name__, frames)


def error_response(error: BaseException) -> Response:
    """The answer to an error."""
    answer = as_api_error(error)
    return Response(answer.body, answer.status, answer.headers, "application/json")


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is no JSON, longer than `limit` bytes (with or without a length announced), or too slow.
        HungUp: the client is gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        # This also keeps web pages from sending requests across origins without asking first.
        raise ApiError(415, "The body must be JSON; send 'Content-Type: application/json'.")
    too_large = ApiError(
        413, f"The request's body is longer than {limit} bytes; send less at once.", code="request_too_large"
    )
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise HungUp
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, "The request's body took too long to arrive.", kind="timeout_error") from None


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T], seconds: float | None) -> T:
    """The result of `work`, which is cancelled as soon as the client hangs up or the time is over.

    Raises:
        HungUp: the client is gone.
        TimeoutError: `seconds` are over.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_hung_up(receive))
    try:
        await asyncio.wait((task, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise HungUp if gone.done() else TimeoutError
    finally:
        for each in (task, gone):
            each.cancel()
        # Not before the engine has its blocks back is the request over.
        await asyncio.gather(task, gone, return_exceptions=True)


async def begin(receive: Receive, events: AsyncGenerator[bytes, None]) -> asyncio.Task[bytes]:
    """Start a stream's source and wait a little for its first event, so that most refusals still are a status.

    Returns:
        The first event, to be awaited: if the queue is long, the stream begins before it is there.

    Raises:
        HungUp: the client is gone.
        Exception: whatever the source raised.
    """

    async def step() -> bytes:
        return await anext(events)

    first = asyncio.create_task(step())
    gone = asyncio.create_task(_hung_up(receive))
    try:
        await asyncio.wait((first, gone), timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if first.done():
            first.result()
        elif gone.done():
            raise HungUp
        return first
    except BaseException:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await events.aclose()
        raise
    finally:
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)


class EventStream(Response):
    """Server-sent events, sent as they come; the source is closed as soon as the client hangs up.

    An error on the way is the last event, `data: {"error": ...}`, and the stream has no `[DONE]` then.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: Awaitable[bytes],
        events: AsyncGenerator[bytes, None],
        seconds: float,
    ) -> None:
        """Send `first` and then `events`, for at most `seconds`."""
        super().__init__()
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # proxies must not wait for more
        self._first, self._events, self._seconds = first, events, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = b""
        try:
            await while_connected(receive, self._pump(send), self._seconds)
        except TimeoutError:
            last = _event(timed_out(self._seconds))
        except HungUp:
            return
        except Exception as error:
            log_failure(error)
            last = _event(as_api_error(error))
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _pump(self, send: Send) -> None:
        async with contextlib.aclosing(self._events):
            try:
                event = await self._first
                while True:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                    event = await anext(self._events)
            except StopAsyncIteration:
                return


def _event(error: ApiError) -> bytes:
    return b"data: " + error.body + b"\n\n"
