"""Faster modules for the sealed blocks, for every family alike: put in place of the family's own after loading.

- Linear layers have their weights packed once, as oneDNN wants them. Torch's own `linear` lays a weight out anew in
  each call, which for a few tokens costs as much as the product. Numbers change by rounding only.
- Linear layers that read the same input (query, key, value; gate, up) are one product. Bit for bit the same.
- RMS norms run as one call of torch, where a trial shows the results to be the same, bit for bit.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # read the same input, in this order
_LEAST_FP32 = 1 << 19  # weights; for smaller ones in fp32 torch's own call is quicker


def speed_up(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace modules of a loaded model that runs without gradients. The memory of replaced weights is freed."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, _fused_norm(child, dtype))
    if not _can_pack(dtype):
        return
    for module in list(model.modules()):
        for names in _SIBLINGS:
            parts = [getattr(module, name, None) for name in names]
            if all(type(part) is nn.Linear for part in parts):
                _merge(module, names, parts, dtype)  # type: ignore[arg-type] - all are linear
        for name, child in list(module.named_children()):
            if type(child) in (nn.Linear, Conv1D):
                weight, bias = _weight_and_bias(child)
                if _is_worth_packing(weight.numel(), dtype):
                    setattr(module, name, PackedLinear(weight, bias))


class PackedLinear(nn.Module):
    """A linear layer around a packed weight."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Pack `weight` [out, in]."""
        super().__init__()
        # Plain attributes: a packed tensor can be neither moved nor saved as parameters are.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]"""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")


class _Merged:
    """Several linear layers as one. The first to be asked for an input computes for all."""

    def __init__(self, linear: PackedLinear, sizes: list[int]) -> None:
        self._linear, self._sizes = linear, sizes
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor] = []

    def output(self, x: torch.Tensor, part: int) -> torch.Tensor:
        if self._input is not x:
            self._input, self._outputs = x, list(self._linear(x).split(self._sizes, -1))
        out = self._outputs[part]
        if part == len(self._sizes) - 1:
            self._input, self._outputs = None, []
        return out


class LinearPart(nn.Module):
    """One of several merged linear layers."""

    def __init__(self, merged: _Merged, part: int) -> None:
        super().__init__()
        self._merged, self._part = merged, part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out of this part], a view of the output of all."""
        return self._merged.output(x, self._part)


def _merge(module: nn.Module, names: tuple[str, ...], parts: list[nn.Linear], dtype: torch.dtype) -> None:
    """Put one product in place of several linear layers, if they fit together."""
    weights, biases = zip(*(_weight_and_bias(part) for part in parts), strict=True)
    total = sum(weight.numel() for weight in weights)
    same_input = len({part.in_features for part in parts}) == 1
    if not same_input or len({bias is None for bias in biases}) > 1 or not _is_worth_packing(total, dtype):
        return
    bias = None if biases[0] is None else torch.cat(biases)  # type: ignore[arg-type] - none of them is None then
    merged = _Merged(PackedLinear(torch.cat(weights), bias), [part.out_features for part in parts])
    for index, name in enumerate(names):
        setattr(module, name, LinearPart(merged, index))


def _weight_and_bias(linear: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [out, in] and bias of a linear layer; GPT-2's keeps its weight as [in, out]."""
    weight, bias = linear.weight.detach(), linear.bias  # type: ignore[operator, union-attr]
    weight = weight.t() if type(linear) is Conv1D else weight
    return weight, None if bias is None else bias.detach()  # type: ignore[operator, union-attr]


def _is_worth_packing(weights: int, dtype: torch.dtype) -> bool:
    return dtype != torch.float32 or weights >= _LEAST_FP32


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


class FusedNorm(nn.Module):
    """An RMS norm in one call of torch."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self._weight, self._eps, self._shape = weight, eps, tuple(weight.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]"""
        return F.rms_norm(x, self._shape, self._weight, self._eps)


def _fused_norm(norm: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A fused norm that gives the same bits as `norm` for numbers of many sizes, or `norm` itself."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, torch.Tensor) or not isinstance(eps, float):
        return norm
    sizes = torch.logspace(-6, 4, 61)[:, None]
    x = (torch.randn(61, len(weight), generator=torch.Generator().manual_seed(0)) * sizes).to(dtype)
    for factor in (weight.detach(), 1.0 + weight.detach()):  # Gemma's norms multiply by one more than their weight
        fused = FusedNorm(factor, eps)
        if torch.equal(fused(x), norm(x)):
            return fused
    return norm
