"""What can be said of an adapter's folder before anything is loaded: neither PEFT nor torch is needed."""

import json
from pathlib import Path
from typing import Any

from semiopen.bundle.files import MANIFEST_NAME, read_file
from semiopen.bundle.manifest import parse_manifest
from semiopen.errors import SemiopenError

CONFIG_NAME, WEIGHTS_NAME, RECORD_NAME = "adapter_config.json", "adapter_model.safetensors", "tuning.json"


class AdapterError(SemiopenError):
    """An adapter folder is missing, damaged, or made for another bundle."""


def check_adapter(adapter: Path, bundle: Path) -> None:
    """Check that a folder is an adapter of PEFT's, and of this bundle if it says of which.

    Blocks are numbered above the sealed ones, so an adapter fits one split of one model. Those of `semiopen tune`
    say which; others are checked by their tensors' names when they are loaded.

    Raises:
        AdapterError: it is not.
    """
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (adapter / name).is_file():
            raise AdapterError(f"{adapter} has no {name}; give the folder that 'semiopen tune' or PEFT has written.")
    if not (adapter / RECORD_NAME).is_file():
        return
    there, here = _json(adapter / RECORD_NAME)["split"], split_of(bundle)
    if there != here:
        words = "{architecture} with {sealed} of {blocks} blocks sealed"
        raise AdapterError(
            f"{adapter} was tuned on a {words.format(**there)}; {bundle} is a {words.format(**here)}. Tune again on "
            "this bundle."
        )


def split_of(bundle: Path) -> dict[str, Any]:
    """What decides how open blocks are numbered, as the bundle says it; not verified."""
    manifest = parse_manifest(read_file(bundle, MANIFEST_NAME))
    return {"architecture": manifest.architecture, "blocks": manifest.num_layers, "sealed": manifest.plan.prefix}


def lora_rank(adapter: Path) -> int:
    """The largest rank of an adapter's layers.

    Raises:
        AdapterError: it is no LoRA.
    """
    config = _json(adapter / CONFIG_NAME)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{adapter} is no LoRA adapter, and vLLM takes no other; use --engine transformers.")
    return max(config["r"], *(config.get("rank_pattern") or {}).values(), 1)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError:
        raise AdapterError(f"{path} is not JSON; the adapter is damaged.") from None
