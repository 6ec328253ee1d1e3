"""The head of a bundle under vLLM, where it is sealed or its words are shuffled.

With the right to all logits they come from the enclave, and vLLM does with them what it always does. Without, vLLM gets
a stand-in, and `choice` has the enclave choose in place of vLLM's sampler.

Legend: N rows, V vocabulary, H hidden size.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from semiopen.host.client import RowChoice
from semiopen.host.enclave_head import draw_words
from semiopen.host.vllm_plugin.sealed_prefix import SealedPrefix
from semiopen.model.plan import Head

if TYPE_CHECKING:
    from semiopen.host.vllm_plugin.choice import Request


class NoNorm(nn.Module):
    """Stands where a sealed head's norm was: the enclave norms the sum."""

    def forward(self, states: torch.Tensor, residual: torch.Tensor | None = None) -> object:
        """States as they are; with a residual both as vLLM's fused norms give them."""
        return states if residual is None else (states + residual, residual)


class EnclaveHead:
    """Turns what the open blocks gave into logits, or into a stand-in for them."""

    def __init__(self, kind: Head, vocab_size: int, prefix: SealedPrefix) -> None:
        self._kind: Head = kind
        self._vocab_size = vocab_size
        self._prefix = prefix
        self._order: torch.Tensor | None = None

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] fp32, or a stand-in for them [N, 1].

        Args:
            output: [N, H] states below a sealed head; [N, V] logits in the order of a shuffled one.

        Raises:
            EnclaveError: the enclave refuses, or is gone.
        """
        prefix = self._prefix
        if not prefix.opened:  # a profiling run
            return output.new_zeros(len(output), self._vocab_size, dtype=torch.float32)
        if not prefix.client.welcome.rights.all_logits:
            return Choosing.mark(self._kind, output, self._vocab_size, prefix)
        if self._kind == "sealed":
            found = prefix.ask(lambda: prefix.client.score(output))
        else:
            order = prefix.ask(self._find_order)
            found = None if order is None else output.float()[:, order]
        return refusal(len(output), self._vocab_size, output.device) if found is None else found.to(output.device)

    def _find_order(self) -> torch.Tensor:
        """The shuffled number [V] of each true word."""
        if self._order is None:
            self._order = self._prefix.client.word_order(self._vocab_size)
        return self._order


class Choosing:
    """What goes with a stand-in for logits: all that choosing its tokens needs, beside the requests."""

    MARK = "semiopen_choosing"  # the stand-in's attribute

    @classmethod
    def mark(cls, kind: Head, output: torch.Tensor, vocab_size: int, prefix: SealedPrefix) -> torch.Tensor:
        """A stand-in [N, 1] for the logits of some output."""
        logits = torch.zeros(len(output), 1, device=output.device)
        setattr(logits, cls.MARK, cls(kind, output, vocab_size, prefix))
        return logits

    def __init__(self, kind: Head, output: torch.Tensor, vocab_size: int, prefix: SealedPrefix) -> None:
        self._output = output
        self._vocab_size = vocab_size
        self._prefix = prefix
        self._choose = self._choose_sealed if kind == "sealed" else self._choose_shuffled

    def choose(self, requests: "Sequence[Request]", logprobs: bool) -> tuple[np.ndarray, torch.Tensor | None]:
        """Choose for the requests in its rows.

        Rows of which the prompt is not through get any token; vLLM throws it away.

        Args:
            requests: N.
            logprobs: whether log-probabilities are wanted; only of a sealed head.

        Returns:
            Tokens [N] int64, outside the vocabulary where the lease allows no more; and log-probabilities [N, V + 1] of
            the likeliest, minus infinity where they are not known.

        Raises:
            EnclaveError: the enclave refuses, or is gone.
        """
        held, count = self._prefix.seq_lens, len(requests)
        rows = [row for row in range(count) if held[row] >= requests[row].length]
        tokens = np.zeros(count, dtype=np.int64)
        shown = torch.full((count, self._vocab_size + 1), -torch.inf) if logprobs else None
        if rows:
            choices = [requests[row].row() for row in rows]
            output = self._output if len(rows) == count else self._output[rows]
            chosen = self._prefix.ask(lambda: self._choose(output, choices, logprobs))
            tokens[rows] = self._vocab_size if chosen is None else chosen[0]
            if shown is not None and chosen is not None and chosen[1] is not None:
                shown[rows, : self._vocab_size] = chosen[1]
        return tokens, shown

    def _choose_sealed(
        self, states: torch.Tensor, choices: Sequence[RowChoice], logprobs: bool
    ) -> tuple[np.ndarray, torch.Tensor | None]:
        return self._prefix.client.choose(states, choices, "vllm", logprobs)

    def _choose_shuffled(
        self, logits: torch.Tensor, choices: Sequence[RowChoice], logprobs: bool
    ) -> tuple[np.ndarray, None]:
        return self._prefix.client.reveal(draw_words(logits.float(), choices, "vllm")), None


def refusal(rows: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """Logits [rows, V + 1] that are certain of a token outside the vocabulary: the lease allows no more."""
    logits = torch.full((rows, vocab_size + 1), -torch.inf, device=device)
    logits[:, vocab_size] = 0
    return logits
