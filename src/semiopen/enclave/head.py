"""The sealed head: final norm, output projection and the choice of tokens; and the table of a shuffled one.

Legend: R rows, H hidden size, V vocabulary.
"""

import hashlib

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from semiopen.enclave.kernels import speed_up
from semiopen.enclave.trusted_state import CheckedChoice
from semiopen.errors import BundleError
from semiopen.model.families import FAMILIES
from semiopen.model.sampling import draw, penalise
from semiopen.model.split import causal_lm_class, cut_layers

_ROWS = 64  # rows of logits held at once: 64 MiB at 256,000 tokens
_SEED = 2**64


class SealedHead:
    """Norm and projection of one model, in one dtype."""

    def __init__(
        self,
        config: PreTrainedConfig,
        tensors: dict[str, torch.Tensor],
        dtype: torch.dtype,
        secret: bytes,
        gradients: bool,
    ) -> None:
        """Build the modules around `tensors`.

        Args:
            config: of the model, with any number of blocks.
            tensors: norm and projection under their checkpoint names.
            dtype: dtype to compute in; logits are fp32 afterwards.
            secret: 32 bytes that random numbers come from, beside a request's seed. Who knew them could choose what
                is drawn, and read off logits by bisection.
            gradients: keep the projection in a form that has gradients, which costs speed. Training an adapter needs
                them; nothing else does.

        Raises:
            BundleError: the tensors are not exactly those that the config needs.
        """
        family = FAMILIES[config.model_type]
        model_class = causal_lm_class(config)
        self.vocab_size: int = config.vocab_size
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        self._secret = secret
        self.gradients = gradients
        own = cut_layers(config, 0, 0)
        own.tie_word_embeddings = False
        model, info = model_class.from_pretrained(  # type: ignore[misc]
            None, config=own, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
        before = {family.embedding, family.positions}  # what a model has below its blocks
        base = f"{model_class.base_model_prefix}."
        unmet = {name for name in info["missing_keys"] if name.removeprefix(base).split(".")[0] not in before}
        if unmet or info["unexpected_keys"] or info["mismatched_keys"]:
            raise BundleError("The sealed head does not fit config.json; seal the model again.")
        self._norm, self._projection = _parts(model, family.norm)
        self._norm.eval().requires_grad_(False)
        self._projection.eval().requires_grad_(False)
        tensors.clear()
        if not gradients:
            both = torch.nn.ModuleList([self._norm, self._projection])
            with torch.inference_mode():
                speed_up(both, dtype)
            self._norm, self._projection = both[0], both[1]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[R, H] -> [R, V] fp32"""
        logits = self._projection(self._norm(states)).float()
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    def choose(self, choice: CheckedChoice, keep: torch.Tensor | None) -> np.ndarray:
        """Choose a token [R] int64 for each row; logits are written to `keep` [R, V] where it is given."""
        tokens: list[np.ndarray] = []
        for begin in range(0, len(choice), _ROWS):
            part = choice.part(begin, begin + _ROWS)
            logits = self.logits(part.states)
            if keep is not None:
                keep[begin : begin + _ROWS] = logits
            for row, (logit, cut) in enumerate(zip(logits, part.cuts, strict=True)):
                prompt, answer = part.history(row)
                if cut.repetition != 1:
                    penalise(logit, torch.from_numpy(np.unique(np.concatenate([prompt, answer]))), cut.repetition)
                if (cut.presence or cut.frequency) and len(answer):
                    seen, counts = np.unique(answer, return_counts=True)
                    taken = cut.presence + cut.frequency * torch.from_numpy(counts.astype(np.float32))
                    logit[torch.from_numpy(seen)] -= taken
            numbers = [self._number(cut.seed, cut.place) for cut in part.cuts]
            tokens.append(draw(logits, part.cuts, numbers).numpy())
        return np.concatenate(tokens)

    def backward(self, states: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Gradients [R, H] of states [R, H], of those [R, V] fp32 of their logits."""
        parts = []
        for some, above in zip(states.split(_ROWS), gradients.split(_ROWS), strict=True):
            with torch.inference_mode(False), torch.enable_grad():
                below = some.clone().requires_grad_(True)
                logits = self.logits(below)
                parts.append(torch.autograd.grad(logits, below, above.clone())[0])
        return torch.cat(parts)

    def _number(self, seed: int, place: int) -> float:
        """A random number in [0, 1) of a seed's n-th token: the same whenever it is asked for, and nobody's choice."""
        data = (seed % _SEED).to_bytes(8, "little") + place.to_bytes(8, "little")
        digest = hashlib.blake2b(data, key=self._secret, digest_size=8, person=b"semiopen-draw").digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53


def mask_to_top(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Log-probabilities of the `count` likeliest tokens of logits [R, V]; minus infinity elsewhere."""
    values = logits.log_softmax(-1)
    best = values.topk(min(count, values.shape[1]), dim=-1)
    return torch.full_like(values, -torch.inf).scatter_(1, best.indices, best.values)


def read_shuffle(table: torch.Tensor, vocab_size: int) -> np.ndarray:
    """The true number [V] int64 of each word of a shuffled head.

    Raises:
        BundleError: not a permutation of the vocabulary.
    """
    numbers = table.numpy().astype(np.int64)
    if numbers.shape != (vocab_size,) or not np.array_equal(np.sort(numbers), np.arange(vocab_size)):
        raise BundleError("The sealed order of words is damaged; seal the model again.")
    return numbers


def _parts(model: PreTrainedModel, norm: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    projection = model.get_output_embeddings()
    assert isinstance(projection, torch.nn.Module), "a causal language model has a projection"
    return getattr(model.base_model, norm), projection
