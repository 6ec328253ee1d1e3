"""Where attention of the open blocks passes through the enclave (`kv: enclave`), ahead of each output projection.

Legend: R rows (tokens of all sequences), A numbers of a token's attention.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from semiopen.host.client import EnclaveClient
from semiopen.host.embedding import EnclaveEmbedding
from semiopen.model.kv_symmetries import OUTPUTS


class Unmixer:
    """Puts the attention of a model's blocks in order, by the enclave.

    Attributes:
        client: asked instead of the embedding's session, by an engine that has its own.
    """

    def __init__(self, embedding: EnclaveEmbedding, blocks: nn.ModuleList) -> None:
        self._embedding = embedding
        self.client: EnclaveClient | None = None
        for number, block in enumerate(blocks):
            attention, name = _projection(block)
            attention.register_forward_pre_hook(_Before(name, number, self))

    def unmix(self, attention: torch.Tensor, block: int) -> torch.Tensor:
        """Attention [..., A] of a block in its true order, with gradients.

        Raises:
            EnclaveError: there is no enclave, or it refuses.
        """
        client = self.client or self._embedding.session.client
        result: Any = _Unmix.apply(attention.reshape(-1, attention.shape[-1]), client, block)
        return result.view(attention.shape)


class _Before:
    """Has an attention's output projection read what the enclave put in order.

    It looks for the projection at each call, as an adapter wraps it, and must read the same order as what it wraps.
    """

    def __init__(self, name: str, block: int, unmixer: Unmixer) -> None:
        self._name, self._block, self._unmixer = name, block, unmixer
        self._at: nn.Module | None = None
        self._handle: RemovableHandle | None = None

    def __call__(self, attention: nn.Module, args: tuple) -> None:
        projection = getattr(attention, self._name)
        if projection is self._at:
            return
        if self._handle is not None:
            self._handle.remove()
        self._at, self._handle = projection, projection.register_forward_pre_hook(self._unmix)

    def _unmix(self, projection: nn.Module, args: tuple) -> tuple:
        return self._unmixer.unmix(args[0], self._block), *args[1:]


class _Unmix(torch.autograd.Function):
    """Attention [R, A] in order; its gradients go back the other way round."""

    @staticmethod
    def forward(ctx: Any, attention: torch.Tensor, client: EnclaveClient, block: int) -> torch.Tensor:  # type: ignore[override]
        ctx.client, ctx.block = client, block
        return client.unmix(block, attention).to(attention)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return ctx.client.unmix(ctx.block, gradients[0], back=True).to(gradients[0]), None, None


def _projection(block: nn.Module) -> tuple[nn.Module, str]:
    """The attention of a block, and the name of its output projection."""
    for path in OUTPUTS:
        attention, name = path.split(".")
        if hasattr(getattr(block, attention, None), name):
            return getattr(block, attention), name
    raise AssertionError("every family that can be sealed has one")
