"""Errors as OpenAI's clients understand them: a status, and `{"error": {message, type, param, code}}`."""

import json
import math
from typing import Any

from semiopen.host.serving.engine import EngineBusy, EngineUnavailable, LeaseRefused, RateLimited, RequestRefused

INTERNAL_MESSAGE = "The server failed at this request; its log has the place."


class ApiError(Exception):
    """An answer that is an error. The message is one sentence and never repeats what the client sent."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()
        self.headers = headers or {}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that can never succeed."""
    return ApiError(400, message, param=param, code=code)


def too_long(tokens: int, max_tokens: int, context: int, param: str) -> ApiError:
    """A prompt, with the tokens asked for, beyond the context."""
    return bad(
        f"This model's context is {context} tokens; the request has {tokens} tokens in the prompt and asks for "
        f"{max_tokens} more.",
        param,
        "context_length_exceeded",
    )


def timed_out(seconds: float) -> ApiError:
    """A request that ran longer than the server lets one run."""
    return ApiError(
        504, f"The request ran longer than {seconds:g} s; ask for fewer tokens.", kind="timeout_error", code="timeout"
    )


def as_api_error(error: BaseException) -> ApiError:
    """The answer to an error; anything unexpected is told without its message, which may hold the client's text."""
    match error:
        case ApiError():
            return error
        case RateLimited():
            return _busy(error, str(error), "rate_limit_exceeded")
        case EngineBusy():
            return _busy(error, "All places in the queue are taken; try again later.", "queue_full")
        case EngineUnavailable():
            return ApiError(
                503,
                "The engine stopped or is being started again; try again.",
                kind="service_unavailable_error",
                code="engine_unavailable",
                headers={"Retry-After": "1"},
            )
        case LeaseRefused():
            return ApiError(403, str(error), kind="permission_error", code="lease")
        case RequestRefused():
            return bad(str(error))
        case _:
            return ApiError(500, INTERNAL_MESSAGE, kind="server_error", code="internal_error")


def _busy(error: EngineBusy, message: str, code: str) -> ApiError:
    retry = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    return ApiError(429, message, kind="rate_limit_error", code=code, headers=retry)


def from_validation(problems: list[Any]) -> ApiError:
    """The first problem that pydantic found, by the parameter's name and without its value."""
    first = problems[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] == "json_invalid":
        return bad("The request's body is not valid JSON.")
    name = ".".join(place) or None
    message = str(first["msg"]).removeprefix("Value error, ")
    return bad(f"{name}: {message}" if name else message, name)
