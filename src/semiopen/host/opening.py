"""The heavy half of opening a bundle: the host's model, and its tie to an enclave."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from semiopen.auto_classes import SemiopenConfig
from semiopen.bundle.reader import VerifiedBundle
from semiopen.errors import BundleError, EnclaveError
from semiopen.host.client import EnclaveClient
from semiopen.host.embedding import EnclaveSession
from semiopen.host.modeling import SemiopenModel, host_class
from semiopen.model.split import causal_lm_class
from semiopen.protocol.messages import Welcome


def build(folder: Path, dtype: torch.dtype | str | None, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Build the host's model of a verified bundle, with its enclave still to be attached.

    Raises:
        BundleError: the open tensors are not those that the config needs.
    """
    config = cast(PreTrainedConfig, cast(SemiopenConfig, SemiopenConfig.from_pretrained(folder)).text_config)
    with _quiet():
        loaded = host_class(causal_lm_class(config)).from_pretrained(
            folder,
            config=config,
            dtype=dtype if dtype is not None else config.dtype,
            output_loading_info=True,
            **kwargs,
        )
    model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    if info["missing_keys"] or info["mismatched_keys"]:
        # transformers would go on with random weights in their place.
        lacking = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})[0]
        raise BundleError(f"The open tensors of {folder} do not fit config.json ({lacking}); seal the model again.")
    model.config.name_or_path = str(folder)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' loading bar, which says nothing about this model's parts."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def attach(
    model: PreTrainedModel,
    client: EnclaveClient,
    verified: VerifiedBundle,
    kv_tokens: int,
    close: Callable[[], None],
) -> None:
    """Give the model its enclave; `close` is called when the model goes, and at once if the two do not match.

    Raises:
        EnclaveError: the enclave holds another bundle, computes in another dtype, or has no room.
    """
    try:
        check_match(client.welcome, verified, str(model.dtype).removeprefix("torch."))
        session = EnclaveSession(client, kv_tokens)
    except BaseException:
        close()
        raise
    cast(SemiopenModel, model).enclave.attach(session, weakref.finalize(model, close))


def check_match(welcome: Welcome, verified: VerifiedBundle, dtype: str) -> None:
    """Check that an enclave holds this bundle and computes in the host's dtype.

    Args:
        welcome: what the enclave says.
        verified: the bundle.
        dtype: in which the open blocks compute.

    Raises:
        EnclaveError: it does not.
    """
    if welcome.bundle_digest != verified.digest:
        raise EnclaveError("The enclave holds another bundle; start one with this bundle.")
    if welcome.dtype != dtype:
        raise EnclaveError(f"The enclave computes in {welcome.dtype}, this model in {dtype}; give both the same dtype.")
