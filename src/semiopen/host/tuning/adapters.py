"""Adapters of a bundle: written after tuning, and put on the open blocks when a bundle is opened."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from semiopen.errors import SemiopenError
from semiopen.host.tuning.adapter_files import RECORD_NAME, AdapterError

try:
    from peft import PeftConfig, PeftModel, get_peft_model
    from peft.utils import load_peft_weights, set_peft_model_state_dict
except ModuleNotFoundError:
    raise SemiopenError("Adapters need the package peft; install it with: pip install 'semiopen[tune]'") from None


def put_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge an adapter into the open blocks, which then run as fast as without.

    Args:
        model: from `semiopen.load` or `opening.build`; it is changed.
        folder: PEFT's adapter, its blocks numbered from 0 in the open part; `check_adapter` has seen it.

    Returns:
        The same model. In bf16 the merged weights are rounded once; `PeftModel.from_pretrained` keeps both apart.

    Raises:
        AdapterError: no adapter of these blocks.
    """
    try:
        config = cast(PeftConfig, PeftConfig.from_pretrained(str(folder)))
        config.inference_mode = True
        config.base_model_name_or_path = None  # where its bundle lay when it was tuned says nothing here
        weights = load_peft_weights(str(folder), device="cpu")
        wrapped = cast(PeftModel, get_peft_model(model, config))
        result: Any = set_peft_model_state_dict(wrapped, weights)
    except (ValueError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{folder} does not fit the open blocks of this bundle ({_first_line(error)}).") from None
    unknown = sorted(result.unexpected_keys)
    lacking = sorted(key for key in result.missing_keys if ".default" in key)
    if unknown or lacking:
        raise AdapterError(
            f"{folder} was made for other blocks ({(unknown or lacking)[0]}); give an adapter that was tuned on this "
            "bundle, with blocks numbered from 0 above the sealed ones."
        )
    return cast(Any, wrapped).merge_and_unload()


def save_adapter(model: PeftModel, out: Path, record: dict[str, Any], card: str) -> None:
    """Write PEFT's folder, with a record of the run and a model card; whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        # Not "auto": PEFT would compare vocabularies, and may take the sealed embedding for one to be saved.
        model.save_pretrained(str(beside), save_embedding_layers=False)
        (beside / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n")
        (beside / "README.md").write_text(card)
        beside.replace(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
