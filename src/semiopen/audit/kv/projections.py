"""One block's key and value projections: forward from states, and back to the normed state by least squares.

Legend: H hidden size, K key-value heads, D size of a head.
"""

from collections.abc import Mapping

import torch
from transformers import PreTrainedConfig

from semiopen.audit.weights.layout import check
from semiopen.errors import SemiopenError


class Projections:
    """W_k and W_v of one block behind its norm, as keys and values come out of them before any rotary turn."""

    def __init__(self, config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor], block: int) -> None:
        """Read them.

        Args:
            config: of the whole model.
            tensors: under the whole model's names.
            block: its number.

        Raises:
            UnsupportedModelError: another family.
            SemiopenError: the block is not among the tensors.
        """
        check(config)
        lead = f"model.layers.{block}."
        try:
            gain = tensors[f"{lead}input_layernorm.weight"].float()
            self._key, self._value = (
                tensors[f"{lead}self_attn.{name}.weight"].float() for name in ("k_proj", "v_proj")
            )
        except KeyError as error:
            raise SemiopenError(f"These weights have no {error}; attack a block that is open.") from None
        self._gain, self._eps, self._heads = gain, config.rms_norm_eps, config.num_key_value_heads
        self._key_bias, self._value_bias = (
            tensors.get(f"{lead}self_attn.{name}.bias", torch.zeros(len(self._key))).float()
            for name in ("k_proj", "v_proj")
        )
        norm = tensors.get(f"{lead}self_attn.k_norm.weight")
        self._key_norm = None if norm is None else norm.float()

    def of(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [N, K, D] of states [N, H]."""
        into = self.norm(states) * self._gain
        key = (into @ self._key.T + self._key_bias).unflatten(-1, (self._heads, -1))
        value = (into @ self._value.T + self._value_bias).unflatten(-1, (self._heads, -1))
        if self._key_norm is not None:
            key = self.norm(key) * self._key_norm
        return key, value

    def norm(self, states: torch.Tensor) -> torch.Tensor:
        """States over their root mean square: all of them that a block sees."""
        states = states.float()
        return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self._eps)

    def back(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[N, H] normed states that give these keys and values [N, K, D], of least norm where that is not determined.

        A family that norms its keys has lost their length, so that the values alone are solved for.
        """
        weight, seen = self._value * self._gain, values.flatten(1) - self._value_bias
        if self._key_norm is None:
            weight = torch.cat([self._key * self._gain, weight])
            seen = torch.cat([keys.flatten(1) - self._key_bias, seen], 1)
        found = torch.linalg.lstsq(weight.double(), seen.double().T, driver="gelsd").solution
        return found.T.float()
