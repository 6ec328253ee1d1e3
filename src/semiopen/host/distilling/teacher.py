"""The teacher: a bundle behind its enclave, asked for logits like any transformers model."""

from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from semiopen.errors import EnclaveError
from semiopen.host.load import load
from semiopen.host.modeling import session_of
from semiopen.host.tuning.batches import IGNORED


def open_teacher(
    bundle: Path,
    keys: str | Path | None,
    enclave: str | Path | None,
    vendor_key: str | Path | None,
    dtype: str | None,
    threads: int,
    lease: str | Path | None,
) -> PreTrainedModel:
    """Open a bundle as a teacher; arguments as for `semiopen.load`.

    Raises:
        EnclaveError: no enclave, or its lease gives no right to distil (code `lease`).
        SemiopenError: the bundle or the keys are not usable.
    """
    model = load(bundle, keys, enclave, dtype, vendor_key, threads=threads, lease=lease)
    if not session_of(model).client.welcome.rights.distil:
        model.enclave.close()  # type: ignore[operator, union-attr]
        raise EnclaveError(
            "The lease gives no right to distil this model; ask the vendor for one that does, and give it as --lease.",
            "lease",
        )
    return model.eval().requires_grad_(False)


def tokens_run(model: PreTrainedModel) -> int:
    """Tokens that the enclave has run since it started, for whomever."""
    return session_of(model).client.status().tokens


def learned_logits(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Logits [M, V] at the places of a batch whose next token is learned, row by row.

    The head sees these places only: a sealed one counts its answers, and an open one is often the largest matrix.

    Args:
        model: any causal language model, on any device.
        batch: from `batches.collate`; the logits come to its device.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))  # all may be sealed
    learned = (batch["shift_labels"] != IGNORED).to(device)  # [B, K], as the states that come to the head
    given = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "logits_to_keep")}
    head = cast(torch.nn.Module, cast(PreTrainedModel, model).get_output_embeddings())
    hook = head.register_forward_pre_hook(lambda _, states: (states[0][learned][None],))
    try:
        return model(**given, use_cache=False).logits[0].to(batch["labels"].device)
    finally:
        hook.remove()


def teacher_logits(teacher: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """As `learned_logits`, without gradients.

    Raises:
        EnclaveError: the enclave refuses, as when a lease is used up, or is gone; the message says how to go on.
    """
    try:
        with torch.no_grad(), torch.autocast(batch["labels"].device.type, enabled=False):
            return learned_logits(teacher, batch)
    except EnclaveError as error:
        if error.code != "lease":
            raise
        raise EnclaveError(
            f"The teacher refuses more: {error} The same command with --resume goes on from here; give another lease "
            "as --lease.",
            "lease",
        ) from None
