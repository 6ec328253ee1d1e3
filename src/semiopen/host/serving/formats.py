"""Answers in OpenAI's two forms: whole, and as chunks of a stream.

A chunk is made once per token of each stream, so its constant parts are made once per request, and only the text
goes through the JSON encoder.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from semiopen.host.serving.completions import Delta, ScoredToken
from semiopen.host.serving.detokenize import Vocabulary

# Only ASCII: some clients take U+2028 and the like, which JSON may hold as they are, for the end of an event's line.
_dumps = json.JSONEncoder(separators=(",", ":")).encode
LEAST_LOGPROB = -9999.0  # for minus infinity, which JSON does not have; as vLLM
DONE = b"data: [DONE]\n\n"


@dataclass
class Usage:
    """Tokens of one request; a prompt counts once, however many texts it has."""

    prompt: int = 0
    generated: int = 0
    cached: int = 0

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass
class WholeText:
    """A text, once all its deltas are in."""

    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish: str | None = None
    stop_reason: str | None = None

    def add(self, delta: Delta) -> None:
        """Append a delta."""
        self.text += delta.text
        self.tokens += delta.tokens
        self.token_ids += delta.token_ids
        self.finish, self.stop_reason = delta.finish, delta.stop_reason


class Format(Protocol):
    """One of OpenAI's two forms."""

    def opening(self, index: int) -> bytes:
        """The first chunk of a text; none if empty."""
        ...

    def chunk(self, index: int, delta: Delta) -> bytes:
        """The chunk of a delta; none if empty, when there is nothing to tell."""
        ...

    def usage_chunk(self, usage: Usage) -> bytes:
        """The last chunk, if the client asked for it."""
        ...

    def whole(self, texts: Sequence[WholeText], usage: Usage) -> bytes:
        """The answer of a request that is no stream."""
        ...


class _Common:
    kind = ""
    chunk_kind = ""
    id_prefix = ""

    def __init__(
        self,
        request_id: str,
        model: str,
        fingerprint: str,
        vocabulary: Vocabulary,
        *,
        report: bool = False,
        include_usage: bool = False,
        token_ids: bool = False,
    ) -> None:
        """`report` shows log-probabilities, `token_ids` the tokens' ids (vLLM's `return_token_ids`)."""
        self._head: dict[str, Any] = {
            "id": f"{self.id_prefix}-{request_id}",
            "object": self.kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._vocabulary = vocabulary
        self._report = report
        self._token_ids = token_ids
        self._chunk_head = _dumps({**self._head, "object": self.chunk_kind})[:-1]
        self._chunk_tail = '}],"usage":null}\n\n' if include_usage else "}]}\n\n"
        self._start = f'data: {self._chunk_head},"choices":[{{"index":'

    def _chunk(self, index: int, content: str, delta: Delta, logprobs: Any) -> bytes:
        """`content` is JSON: what the two forms have in different places."""
        ended = delta.finish
        parts = f'{self._start}{index},{content},"logprobs":{"null" if logprobs is None else _dumps(logprobs)},'
        parts += '"finish_reason":null' if ended is None else f'"finish_reason":"{ended}"'
        if ended is not None:
            parts += f',"stop_reason":{_dumps(delta.stop_reason)}'
        if self._token_ids:
            parts += f',"token_ids":{_dumps(list(delta.token_ids))}'
        return (parts + self._chunk_tail).encode()

    def usage_chunk(self, usage: Usage) -> bytes:
        return f'data: {self._chunk_head},"choices":[],"usage":{_dumps(usage.as_dict())}}}\n\n'.encode()

    def whole(self, texts: Sequence[WholeText], usage: Usage) -> bytes:
        choices = [
            {
                "index": index,
                **self._body(text),
                "logprobs": self._logprobs(text.tokens) if self._report else None,
                "finish_reason": text.finish,
                "stop_reason": text.stop_reason,
                **({"token_ids": text.token_ids} if self._token_ids else {}),
            }
            for index, text in enumerate(texts)
        ]
        return _dumps({**self._head, "choices": choices, "usage": usage.as_dict()}).encode()

    def _body(self, text: WholeText) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> Any:
        raise NotImplementedError


class CompletionFormat(_Common):
    """`text_completion`."""

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl"

    def opening(self, index: int) -> bytes:
        """Nothing: the first chunk already has text."""
        return b""

    def chunk(self, index: int, delta: Delta) -> bytes:
        """See `Format`."""
        if not (delta.text or delta.tokens or delta.finish or (self._token_ids and delta.token_ids)):
            return b""
        logprobs = self._logprobs(delta.tokens) if self._report else None
        return self._chunk(index, f'"text":{_dumps(delta.text)}', delta, logprobs)

    def _body(self, text: WholeText) -> dict[str, Any]:
        return {"text": text.text}

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        name = self._vocabulary.name
        tops: list[dict[str, float] | None] = []
        for token in tokens:
            if token.logprob is None:
                tops.append(None)
                continue
            top: dict[str, float] = {}
            # The token itself is always there, as OpenAI has it. Tokens that are written alike show the likeliest.
            for other, logprob in (*token.logprob.top, (token.token_id, token.logprob.logprob)):
                top.setdefault(name(other), max(logprob, LEAST_LOGPROB))
            tops.append(top)
        return {
            "tokens": [name(token.token_id) for token in tokens],
            "token_logprobs": [token.logprob and max(token.logprob.logprob, LEAST_LOGPROB) for token in tokens],
            "top_logprobs": tops,
            "text_offset": [token.offset for token in tokens],
        }


class ChatFormat(_Common):
    """`chat.completion` and `chat.completion.chunk`."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def opening(self, index: int) -> bytes:
        """Who speaks."""
        return self._chunk(index, '"delta":{"role":"assistant","content":""}', Delta(), None)

    def chunk(self, index: int, delta: Delta) -> bytes:
        """See `Format`."""
        if not (delta.text or delta.tokens or delta.finish or (self._token_ids and delta.token_ids)):
            return b""
        content = f'{{"content":{_dumps(delta.text)}}}' if delta.text or not delta.finish else "{}"
        logprobs = self._logprobs(delta.tokens) if self._report else None
        return self._chunk(index, f'"delta":{content}', delta, logprobs)

    def _body(self, text: WholeText) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text.text, "refusal": None}}

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        content = []
        for token in tokens:
            assert token.logprob is not None
            entry = self._entry(token.token_id, token.logprob.logprob)
            entry["top_logprobs"] = [self._entry(*other) for other in token.logprob.top]
            content.append(entry)
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._vocabulary.name(token_id),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(self._vocabulary.bytes_of(token_id)),
        }
