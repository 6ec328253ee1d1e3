"""What clients may ask: OpenAI's fields, and those of vLLM's that people script against.

A field that would change the answer and that this server cannot honour is refused by name, never ignored. Unknown
fields are ignored, as OpenAI-compatible servers do.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from semiopen.host.serving.errors import ApiError, bad

MAX_CHOICES = 128  # texts of one request: prompts times n
MAX_LOGPROBS = 20
MAX_STOPS, MAX_STOP_CHARACTERS = 64, 1024
MAX_SALT = 1024  # characters
INT64 = 1 << 63

# What each refused field may still say: what it means when it is left out.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "function_call": ("none",),
    "functions": ([],),
    "logprob_token_ids": ([],),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "return_tokens_as_token_ids": (False,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), ()),
}

TokenId = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]
Content = str | list[dict[str, Any]] | None


class StreamOptions(BaseModel):
    """`stream_options` of both kinds of completions."""

    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    """What both kinds of completions have in common. None is as if the field were left out."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT)] | None = None

    @field_validator("stop")
    @classmethod
    def _some_text(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MAX_STOPS or any(len(one) > MAX_STOP_CHARACTERS for one in stops):
            raise bad(f"stop: at most {MAX_STOPS} stop strings of {MAX_STOP_CHARACTERS} characters.", "stop")
        if not all(stops):
            raise bad("stop: a stop string must not be empty.", "stop")
        return stop

    @model_validator(mode="after")
    def _streams_have_options(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise bad("stream_options: it is only allowed when stream is true.", "stream_options")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Any = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _best_of_all(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise bad("best_of: only the same number as n is supported; leave it out.", "best_of", "unsupported")
        return self


class Message(BaseModel):
    """One message of a conversation. Only text: parts of other kinds are refused."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Content = None

    @model_validator(mode="after")
    def _only_text(self) -> "Message":
        if (self.model_extra or {}).get("tool_calls") or (self.model_extra or {}).get("function_call"):
            raise PydanticCustomError("tools", "messages with tool calls are not supported.")
        if self.content is None:
            raise PydanticCustomError("content", "content is missing.")
        for part in self.content if isinstance(self.content, list) else ():
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise PydanticCustomError("content", "only content parts of type text are supported.")
        return self

    @property
    def text(self) -> str:
        """The content, its parts joined."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part["text"] for part in self.content or ())


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise bad("top_logprobs needs logprobs to be true.", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise bad("continue_final_message and add_generation_prompt exclude each other.", "continue_final_message")
        return self


class TokenizeRequest(BaseModel):
    """`POST /tokenize`, of a text or of messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (not self.messages):
            raise bad("Give either prompt or messages.", "prompt")
        return self


class DetokenizeRequest(BaseModel):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]


def check_fields(extra: dict[str, Any] | None) -> list[str]:
    """Refuse what cannot be honoured among the fields that a request's class does not name.

    Returns:
        Names of the unknown fields, as far as they look like names.

    Raises:
        ApiError: a field asks for what this server does not do.
    """
    unknown = []
    for name, value in (extra or {}).items():
        if name in _REFUSED:
            if value is not None and value not in _REFUSED[name]:
                raise bad(f"{name}: this server does not support it; leave it out.", name, "unsupported")
        elif re.fullmatch(r"[a-z_]{1,40}", name):
            unknown.append(name)
    return unknown


def prompts_of(prompt: Any) -> list[str | list[int]]:
    """The prompts of a completion request: a text, texts, token ids, or lists of token ids.

    Raises:
        ApiError: it is none of these, or there are too many.
    """
    error = bad("prompt: give a string, a list of strings, a list of token ids or a list of such lists.", "prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise error
    if _are_ids(prompt):
        return [prompt]
    if len(prompt) > MAX_CHOICES:
        raise _too_many()
    if all(isinstance(one, str) for one in prompt) or all(isinstance(one, list) and _are_ids(one) for one in prompt):
        return prompt
    raise error


def check_choices(prompts: int, n: int) -> None:
    """Refuse more texts than one request may ask for.

    Raises:
        ApiError: there are more.
    """
    if prompts * n > MAX_CHOICES:
        raise _too_many()


def _too_many() -> ApiError:
    return bad(f"A request may ask for at most {MAX_CHOICES} texts, prompts times n; send several requests.", "n")


def _are_ids(values: list[Any]) -> bool:
    return bool(values) and all(type(value) is int for value in values)
