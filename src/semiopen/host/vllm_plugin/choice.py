"""How vLLM has the enclave choose tokens, where the lease keeps the logits there.

vLLM asks a custom logits processor at admission what of a request it does not allow, and tells it which request lies in
which row. Where vLLM's sampler gets a stand-in for logits, the enclave is asked for a token of each row instead: its
penalties, filters and drawing would be done twice otherwise. Classes with a number are made on demand, as vLLM is told
a class by name: `ChoiceWith20` may show the 20 likeliest.

Legend: N rows of a step, V vocabulary, K likeliest tokens.
"""

import secrets
from typing import Any, cast

import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingType
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from semiopen.host.client import RowChoice
from semiopen.host.serving.enclave_choice import SEED_BITS
from semiopen.host.vllm_plugin.enclave_head import Choosing
from semiopen.host.vllm_plugin.patching import wrap_once

# What of a request needs logits outside the enclave, with the values at which it does nothing.
_NEEDS_LOGITS: dict[str, tuple[Any, ...]] = {
    "logprobs": (None,),
    "prompt_logprobs": (None,),
    "logprob_token_ids": (None, []),
    "prompt_logprob_token_ids": (None,),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None, []),
    "bad_words": (None, []),
    "min_tokens": (0,),
    "structured_outputs": (None,),
    "thinking_token_budget": (None,),
}
_PENALTIES: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
}


def install() -> None:
    """Have vLLM's sampler leave stand-ins for logits to the enclave. Safe to call again; logits are sampled as ever."""
    wrap_once(Sampler, "forward", _sample)


def _sample(
    inner: Any, sampler: Sampler, logits: torch.Tensor, sampling_metadata: SamplingMetadata, *args: Any, **more: Any
) -> Any:
    choosing: Choosing | None = getattr(logits, Choosing.MARK, None)
    if choosing is None:
        return inner(sampler, logits, sampling_metadata, *args, **more)
    (ours,) = (one for one in sampling_metadata.logitsprocs.non_argmax_invariant if isinstance(one, Choice))
    count = sampling_metadata.max_num_logprobs
    chosen, logprobs = choosing.choose(ours.requests(len(logits)), logprobs=count is not None)
    tokens = torch.from_numpy(chosen).to(logits.device)
    likeliest = None if logprobs is None else _likeliest(logprobs.to(logits.device), tokens, cast(int, count))
    return SamplerOutput(tokens.int()[:, None], logprobs_tensors=likeliest)


def _likeliest(logprobs: torch.Tensor, tokens: torch.Tensor, count: int) -> LogprobsTensors:
    """Of the chosen tokens [N] and the K likeliest, as vLLM has them; from [N, V], minus infinity where unknown."""
    best, places = logprobs.topk(count, dim=1)
    own = logprobs.gather(1, tokens[:, None])
    ranks = (logprobs >= own).sum(1)
    return LogprobsTensors(torch.cat([tokens[:, None], places], 1).int(), torch.cat([own, best], 1), ranks)


class LeaseForbids(VLLMValidationError):
    """A request needs logits, which the lease does not allow."""


class Choice(LogitsProcessor):
    """Chooses in a sealed head.

    Attributes:
        shown: of how many likeliest tokens the lease allows log-probabilities.
    """

    shown = 0

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse, before it runs, what needs logits.

        Raises:
            LeaseForbids: such a setting.
        """
        asked = sampling_params.logprobs
        if cls.shown and asked is not None and not 0 <= asked <= cls.shown:
            raise LeaseForbids(
                f"The lease allows log-probabilities of the {cls.shown} likeliest tokens; ask for less.",
                parameter="logprobs",
            )
        _refuse(
            sampling_params,
            {name: _NEEDS_LOGITS[name] for name in _NEEDS_LOGITS if name != "logprobs" or not cls.shown},
        )

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._requests: dict[int, Request] = {}

    def is_argmax_invariant(self) -> bool:
        """It decides for greedy requests too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow which request lies in which row."""
        process_dict_updates(self._requests, batch_update, Request)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Real logits pass; stand-ins for them do not come here."""
        return logits

    def requests(self, count: int) -> "list[Request]":
        """Those of the first rows."""
        return [self._requests[row] for row in range(count)]


class ShuffledChoice(Choice):
    """Chooses among shuffled words, which nobody here can tell from the words that a penalty is for."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """See `Choice`; penalties as well."""
        _refuse(sampling_params, {**_NEEDS_LOGITS, **_PENALTIES})


def __getattr__(name: str) -> type[Choice]:
    number = name.removeprefix(Choice.__name__ + "With")
    if number == name or not number.isdecimal():
        raise AttributeError(name)
    return type(name, (Choice,), {"shown": int(number), "__module__": __name__})


class Request:
    """One request, as vLLM tells its logits processors."""

    def __init__(self, params: SamplingParams, prompt: list[int] | None, answer: list[int]) -> None:
        self._params = params
        self._prompt = prompt or []
        self._answer = answer  # vLLM's own list, to which it adds each token
        self._seed = secrets.randbits(SEED_BITS) if params.seed is None else params.seed

    @property
    def length(self) -> int:
        """Tokens that it has."""
        return len(self._prompt) + len(self._answer)

    def row(self) -> RowChoice:
        """How its next token is to be chosen."""
        params = self._params
        return RowChoice(
            temperature=0.0 if params.sampling_type == SamplingType.GREEDY else params.temperature,
            top_p=params.top_p,
            top_k=max(0, params.top_k),
            min_p=params.min_p,
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            seed=self._seed,
            place=len(self._answer),
            prompt=self._prompt,
            answer=self._answer,
        )


def _refuse(params: SamplingParams, neutral: dict[str, tuple[Any, ...]]) -> None:
    for name, values in neutral.items():
        if getattr(params, name, None) not in values:
            raise LeaseForbids(
                f"{name} needs all logits (logits full), which the lease does not allow; leave it out, or ask the "
                "vendor for a lease with it",
                parameter=name,
            )
