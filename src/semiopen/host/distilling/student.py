"""The student: read, checked against the teacher's vocabulary, and written."""

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import set_seed as seed_everything
from transformers.utils import logging

from semiopen.errors import SemiopenError
from semiopen.model.checkpoint import weight_files

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def check_student(folder: Path) -> None:
    """Check what can be said before a teacher is opened.

    Raises:
        SemiopenError: it is no whole model folder.
    """
    if not (folder / "config.json").is_file():
        raise SemiopenError(f"{folder} has no config.json; give the folder of a transformers model as --student.")
    weight_files(folder)


def check_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Check that a student's token ids mean what the teacher's mean.

    Args:
        folder: of the student; without a tokenizer in it only sizes are compared.
        tokenizer: the bundle's.
        size: the teacher's vocabulary, in logits.

    Raises:
        SemiopenError: they differ.
    """
    own = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    if any((folder / name).is_file() for name in _TOKENIZER_FILES):
        theirs = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder))
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise SemiopenError(
                f"The student in {folder} has another tokenizer than the bundle, so its token ids mean other texts; "
                "give a student of the same tokenizer, or a fresh model of the bundle's vocabulary without one."
            )
    if own != size:
        raise SemiopenError(
            f"The student's vocabulary has {own:,} tokens, the teacher's {size:,}; make them equal with "
            f"model.resize_token_embeddings({size}) and save the student again."
        )


def load_student(folder: Path, lora_rank: int | None, seed: int) -> tuple[torch.nn.Module, torch.dtype]:
    """Load a student in float32, with LoRA layers if asked for.

    Returns:
        The model to train, and the dtype of its folder, in which it is written again.
    """
    dtype = cast(torch.dtype | None, AutoConfig.from_pretrained(folder).get_text_config().dtype) or torch.float32
    with _quiet():
        model = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    seed_everything(seed)
    return (model if lora_rank is None else _with_lora(model, lora_rank)), dtype


def student_digest(folder: Path) -> str:
    """SHA-256 (hex) of the config and the weights."""
    found = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(weight_files(folder)):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def save_student(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, out: Path, dtype: torch.dtype, files: dict[str, str]
) -> None:
    """Write an ordinary model folder, whole or not at all; LoRA layers are merged.

    Args:
        model: from `load_student`; not to be used afterwards.
        tokenizer: written beside it.
        out: the folder; must not exist.
        dtype: of the weights in it.
        files: further texts by name.
    """
    whole = cast(Any, model).merge_and_unload() if hasattr(model, "merge_and_unload") else model
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        with _quiet():
            cast(PreTrainedModel, whole).to(device="cpu", dtype=dtype).save_pretrained(beside)  # type: ignore[call-arg]
        tokenizer.save_pretrained(beside)
        for name, text in files.items():
            (beside / name).write_text(text)
        beside.replace(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _with_lora(model: PreTrainedModel, rank: int) -> torch.nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise SemiopenError(
            "--lora-rank needs the package peft; install it with: pip install 'semiopen[distil]'"
        ) from None
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars, which would tear the one that is shown."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
