"""The OpenAI-compatible API before an engine."""

import contextlib
import hashlib
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from semiopen.errors import SemiopenError
from semiopen.host.serving.completions import Delta, Job, run_all
from semiopen.host.serving.detokenize import Vocabulary
from semiopen.host.serving.engine import Engine, Sampling
from semiopen.host.serving.errors import ApiError, bad, from_validation, timed_out, too_long
from semiopen.host.serving.formats import DONE, ChatFormat, CompletionFormat, Format, Usage, WholeText
from semiopen.host.serving.metrics import Metrics
from semiopen.host.serving.prompts import Prompts
from semiopen.host.serving.schemas import (
    INT64,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
    check_choices,
    check_fields,
    prompts_of,
)
from semiopen.host.serving.transport import (
    KEY_DIGEST,
    EventStream,
    Guard,
    HungUp,
    begin,
    error_response,
    read_body,
    while_connected,
)
from semiopen.version import VERSION

RequestT = TypeVar("RequestT", bound=BaseModel)
logger = logging.getLogger("semiopen.serving")

# What a model's generation_config.json may set, as with vLLM; OpenAI's defaults for what it does not.
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI


@dataclass(frozen=True)
class Settings:
    """How to serve.

    Attributes:
        model: the name that clients ask for.
        fingerprint: `system_fingerprint` of every answer.
        api_keys: any of them opens the API; none leaves it open.
        max_body: longest request, in bytes.
        request_seconds: longest time a request may take.
        side_by_side: texts of one request that run at the same time.
        sampling: defaults for requests that do not say, of the names in `SAMPLING_DEFAULTS`.
        chat_template: replaces the tokenizer's own.
        share_prefixes: whether requests of different API keys begin with each other's KV blocks.
    """

    model: str
    fingerprint: str
    api_keys: Sequence[str] = ()
    max_body: int = 8 << 20
    request_seconds: float = 600.0
    side_by_side: int = 16
    sampling: Mapping[str, float] = field(default_factory=dict)
    chat_template: str | None = None
    share_prefixes: bool = False


def create_app(engine: Engine, tokenizer: Any, settings: Settings) -> Guard:
    """The ASGI application that serves one engine.

    Args:
        engine: what generates; the application does not close it.
        tokenizer: the model's, of transformers.
        settings: how to serve.
    """
    app = FastAPI(title="semiopen", version=VERSION, docs_url=None, redoc_url=None)  # their pages load foreign scripts
    server = _Server(engine, tokenizer, settings)
    for path, method, endpoint in server.routes():
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    for kind in (ApiError, SemiopenError, Exception):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(HungUp, _on_hang_up)
    return Guard(app, settings.api_keys)


async def _on_error(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: "There is nothing at this path.", 405: "This path does not take this method."}
    text = message.get(error.status_code, "The request cannot be answered.")
    return error_response(ApiError(error.status_code, text, headers=dict(error.headers or {})))


async def _on_hang_up(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


class _Server:
    def __init__(self, engine: Engine, tokenizer: Any, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._vocabulary = Vocabulary(tokenizer)
        self._prompts = Prompts(tokenizer, settings.chat_template)
        self._metrics = Metrics(engine, settings.model)
        self._told: set[str] = set()

    def routes(self) -> list[tuple[str, str, Any]]:
        """Path, method and endpoint of all there is."""
        return [
            ("/v1/completions", "POST", self.completions),
            ("/v1/chat/completions", "POST", self.chat),
            ("/v1/models", "GET", self.models),
            ("/v1/models/{name:path}", "GET", self.model),
            ("/tokenize", "POST", self.tokenize),
            ("/detokenize", "POST", self.detokenize),
            ("/health", "GET", self.health),
            ("/live", "GET", self.live),
            ("/metrics", "GET", self.metrics),
            ("/version", "GET", self.version),
        ]

    async def health(self) -> Response:
        """200 when requests are served, 503 while the engine or its enclave starts again."""
        return Response(status_code=200 if self._engine.ready else 503)

    async def live(self) -> Response:
        """200 as long as the server answers at all."""
        return Response(status_code=200)

    async def metrics(self) -> Response:
        """Prometheus metrics."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def version(self) -> dict[str, str]:
        """The version of semiopen."""
        return {"version": VERSION}

    async def models(self) -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> dict[str, Any]:
        """The one model, by its name."""
        self._check_model(name)
        return self._card()

    async def tokenize(self, request: Request) -> dict[str, Any]:
        """Token ids of a text or a conversation."""
        body = await self._parsed(request, TokenizeRequest)
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            tokens = await self._prompts.encode(body.prompt, special)
        else:
            tokens = await self._prompts.encode_chat(
                body.messages or (),
                body.add_generation_prompt,
                body.continue_final_message,
                bool(body.add_special_tokens),
                body.chat_template_kwargs,
            )
        strings = self._prompts.names(tokens) if body.return_token_strs else None
        return {
            "count": len(tokens),
            "max_model_len": self._engine.context,
            "tokens": tokens,
            "token_strs": strings,
        }

    async def detokenize(self, request: Request) -> dict[str, str]:
        """The text of token ids."""
        body = await self._parsed(request, DetokenizeRequest)
        self._check_ids(body.tokens, "tokens")
        return {"prompt": self._prompts.decode(body.tokens)}

    async def completions(self, request: Request) -> Response:
        """Continue texts."""
        body = await self._parsed(request, CompletionRequest)
        prompts = prompts_of(body.prompt)
        n = body.n or 1
        check_choices(len(prompts), n)
        scored = bool(body.echo) and body.logprobs is not None
        jobs, request_id = [], uuid.uuid4().hex
        for given in prompts:
            tokens = given
            if isinstance(tokens, str):
                tokens = await self._prompts.encode(tokens, body.add_special_tokens is not False)
            self._check_ids(tokens, "prompt")
            max_tokens = self._max_tokens(len(tokens), body.max_tokens, DEFAULT_MAX_TOKENS, "prompt")
            echo = None
            if body.echo:
                echo = given if isinstance(given, str) else self._prompts.decode(tokens)
            for choice in range(n):
                sampling = self._sampling(body, max_tokens, choice, body.logprobs, body.logprobs if scored else None)
                jobs.append(self._job(request, body, f"{request_id}-{len(jobs)}", tokens, sampling, echo))
        form = CompletionFormat(
            request_id,
            self._settings.model,
            self._settings.fingerprint,
            self._vocabulary,
            report=body.logprobs is not None,
            include_usage=body.include_usage,
            token_ids=bool(body.return_token_ids),
        )
        return await self._answer(request, body, jobs, n, form)

    async def chat(self, request: Request) -> Response:
        """Continue a conversation."""
        body = await self._parsed(request, ChatRequest)
        tokens = await self._prompts.encode_chat(
            body.messages,
            body.add_generation_prompt is not False,
            bool(body.continue_final_message),
            bool(body.add_special_tokens),
            body.chat_template_kwargs,
        )
        self._check_ids(tokens, "messages")
        asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        max_tokens = self._max_tokens(len(tokens), asked, None, "messages")
        request_id = uuid.uuid4().hex
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        jobs = [
            self._job(
                request,
                body,
                f"{request_id}-{choice}",
                tokens,
                self._sampling(body, max_tokens, choice, logprobs, None),
                None,
            )
            for choice in range(body.n or 1)
        ]
        form = ChatFormat(
            request_id,
            self._settings.model,
            self._settings.fingerprint,
            self._vocabulary,
            report=bool(body.logprobs),
            include_usage=body.include_usage,
            token_ids=bool(body.return_token_ids),
        )
        return await self._answer(request, body, jobs, len(jobs), form)

    async def _answer(
        self, request: Request, body: GenerationRequest, jobs: Sequence[Job], n: int, form: Format
    ) -> Response:
        """Run the jobs, `n` in a row with the same prompt, and answer whole or as a stream."""
        seconds = self._settings.request_seconds
        if body.stream:
            events = self._events(jobs, n, form, body.include_usage)
            return EventStream(await begin(request.receive, events), events, seconds)
        try:
            answer = await while_connected(request.receive, self._whole(jobs, n, form), seconds)
        except TimeoutError:
            raise timed_out(seconds) from None
        return Response(answer, media_type="application/json")

    async def _whole(self, jobs: Sequence[Job], n: int, form: Format) -> bytes:
        texts, usage = [WholeText() for _ in jobs], Usage()
        async with contextlib.aclosing(self._deltas(jobs)) as deltas:  # type: ignore[type-var]
            async for index, delta in deltas:
                texts[index].add(delta)
                _count(usage, delta, index, n)
        return form.whole(texts, usage)

    async def _events(
        self, jobs: Sequence[Job], n: int, form: Format, include_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        usage, opened = Usage(), set()
        async with contextlib.aclosing(self._deltas(jobs)) as deltas:  # type: ignore[type-var]
            async for index, delta in deltas:
                _count(usage, delta, index, n)
                chunk = form.chunk(index, delta)
                if index not in opened:
                    opened.add(index)
                    chunk = form.opening(index) + chunk
                if chunk:
                    yield chunk
        yield form.usage_chunk(usage) + DONE if include_usage else DONE

    def _deltas(self, jobs: Sequence[Job]) -> AsyncIterator[tuple[int, Delta]]:
        return run_all(self._engine, self._vocabulary, jobs, self._metrics, self._settings.side_by_side)

    def _job(
        self,
        request: Request,
        body: GenerationRequest,
        request_id: str,
        tokens: Sequence[int],
        sampling: Sampling,
        echo: str | None,
    ) -> Job:
        return Job(
            request_id,
            tokens,
            sampling,
            body.stops,
            echo,
            report=sampling.logprobs is not None,
            special=body.skip_special_tokens is False,
            include_stop=bool(body.include_stop_str_in_output),
            salt=self._salt(request, body),
        )

    def _salt(self, request: Request, body: GenerationRequest) -> str:
        """Whose KV blocks a text may begin with: those of the same API key and `cache_salt`."""
        key = b"" if self._settings.share_prefixes else request.scope.get(KEY_DIGEST, b"")
        given = (body.cache_salt or "").encode()
        return hashlib.sha256(key + given).hexdigest() if key or given else ""

    def _sampling(
        self,
        body: GenerationRequest,
        max_tokens: int,
        choice: int,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> Sampling:
        given = {name: value for name in SAMPLING_DEFAULTS if (value := getattr(body, name)) is not None}
        chosen: dict[str, Any] = {**self._settings.sampling, **given}
        chosen["top_k"] = max(0, int(chosen.get("top_k", 0)))  # vLLM's clients also write -1 for all
        # Who scores a text asks for one token more and drops the last, so there must be one, also at the text's end.
        scores = prompt_logprobs is not None and max_tokens == 1
        return Sampling(
            max_tokens=max_tokens,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=self._logit_bias(body.logit_bias),
            seed=None if body.seed is None else (body.seed + choice + INT64) % (2 * INT64) - INT64,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop_token_ids=frozenset(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos) or scores,
            **chosen,
        )

    def _logit_bias(self, given: Mapping[str, float] | None) -> dict[int, float]:
        bias = {}
        for key, value in (given or {}).items():
            if not key.isdecimal() or not key.isascii() or len(key) > 9 or int(key) >= self._vocabulary.size:
                raise bad("logit_bias: its keys must be token ids of this model.", "logit_bias")
            bias[int(key)] = value
        return bias

    def _max_tokens(
        self, prompt: int, asked: int | None, default: int | None, param: Literal["prompt", "messages"]
    ) -> int:
        room = self._engine.context - prompt
        if asked is None:
            asked = room if default is None else min(default, room)
            if room < 1:
                raise too_long(prompt, 1, self._engine.context, param)
        if asked > room:
            raise too_long(prompt, asked, self._engine.context, param)
        return asked

    def _check_ids(self, tokens: Sequence[int], param: str) -> None:
        if not tokens:
            raise bad(f"{param}: there must be at least one token.", param)
        if min(tokens) < 0 or max(tokens) >= self._vocabulary.size:
            raise bad(f"{param}: a token id is not in this model's vocabulary.", param)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._settings.model:
            raise ApiError(
                404,
                "This server has no model of that name; GET /v1/models lists what it has.",
                param="model",
                code="model_not_found",
            )

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._settings.model,
            "object": "model",
            "created": 0,
            "owned_by": "semiopen",
            "root": self._settings.model,
            "parent": None,
            "max_model_len": self._engine.context,
        }

    async def _parsed(self, request: Request, kind: type[RequestT]) -> RequestT:
        raw = await read_body(request, self._settings.max_body)
        try:
            body = kind.model_validate_json(raw)
        except ValidationError as error:
            raise from_validation(error.errors(include_input=False, include_url=False, include_context=False)) from None
        self._check_model(getattr(body, "model", None))
        for name in check_fields(body.model_extra):
            if name not in self._told and len(self._told) < 100:
                self._told.add(name)
                logger.warning("Requests have a field %s, which this server does not know and ignores.", name)
        return body


def _count(usage: Usage, delta: Delta, index: int, n: int) -> None:
    usage.generated += len(delta.token_ids)
    if index % n == 0:
        usage.prompt += delta.prompt_tokens
        usage.cached += delta.cached_tokens
