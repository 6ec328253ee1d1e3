"""`semiopen tune`: from a bundle and a file of private data to an adapter.

Everything happens on this machine. The enclave is asked once per example and closed before the first training step,
unless attention passes through it (`kv: enclave`).
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from semiopen.bundle.files import check_is_bundle, read_file
from semiopen.errors import SemiopenError
from semiopen.host.load import load
from semiopen.host.modeling import agree_on_score_cap, session_of
from semiopen.host.tuning.adapter_files import split_of
from semiopen.host.tuning.adapters import save_adapter
from semiopen.host.tuning.batches import StatesDataset
from semiopen.host.tuning.data import Examples, encode, read_rows
from semiopen.host.tuning.prefix_states import PrefixStates, compute_states
from semiopen.host.tuning.settings import StatesPlace, TuneSettings
from semiopen.host.tuning.train import add_lora, mean_loss, train
from semiopen.host.tuning.work import CHECKPOINTS_FOLDER, WorkFolder
from semiopen.version import VERSION

LONGEST = 1024  # tokens of an example, unless the person says otherwise
STATES_FOLDER = "states"

Progress = Callable[[str, int, int], object]
Say = Callable[[str], object]


@dataclass(frozen=True)
class TuneResult:
    """What a run did and what it cost.

    Attributes:
        examples, held_back: learned, and kept for evaluation.
        tokens: of all examples.
        learned_tokens: of the examples that are learned, those that count in the loss.
        truncated, dropped: see `data.Examples`.
        enclave_tokens: what the enclave ran, and a lease would meter, in this run.
        reused_tokens: tokens whose states were there from an earlier run.
        loss_before, loss_after: of the examples held back, nats per token; None without any.
        steps: of the optimiser. trained_parameters: numbers in the adapter.
        states_seconds, training_seconds: of this run.
    """

    examples: int
    held_back: int
    tokens: int
    learned_tokens: int
    truncated: int
    dropped: int
    enclave_tokens: int
    reused_tokens: int
    loss_before: float | None
    loss_after: float | None
    steps: int
    trained_parameters: int
    states_seconds: float
    training_seconds: float


def tune(
    bundle: str | Path,
    data: str | Path,
    out: str | Path,
    keys: str | Path | None = None,
    enclave: str | Path | None = None,
    settings: TuneSettings | None = None,
    *,
    dtype: str | None = None,
    vendor_key: str | Path | None = None,
    threads: int = 0,
    lease: str | Path | None = None,
    work: str | Path | None = None,
    states: StatesPlace = "disk",
    keep_states: bool = False,
    resume: bool = False,
    progress: Progress = lambda what, done, total: None,
    say: Say = lambda text: None,
) -> TuneResult:
    """Tune the open blocks of a bundle with LoRA.

    Args:
        bundle, keys, enclave, vendor_key, threads, lease: as for `semiopen.load`.
        data: JSON Lines or text; see `data.read_rows`.
        out: the adapter's folder, PEFT's format; must not exist.
        settings: of training; the defaults when None.
        dtype: float32 or bfloat16; the bundle's own when None, float32 where that is float16.
        work: folder of what is needed to go on after a kill; OUT.work when None. Removed at the end.
        states: where the prefix's states are kept; `memory` never writes them to disk, and a resumed run asks the
            enclave again.
        keep_states: leave the states in `work`, for further runs over the same data.
        resume: go on with an interrupted run, if there is one.
        progress: told (what, done, total): `states` in tokens, `training` in steps.
        say: told sentences for the person who waits.

    Raises:
        SemiopenError: the bundle, the enclave, the data or a setting is not usable; the message says which.
    """
    bundle, out = Path(bundle), Path(out)
    settings = settings or TuneSettings()
    place = WorkFolder(Path(work) if work else out.with_name(out.name + ".work"))
    if out.exists():
        raise SemiopenError(f"{out} exists already; give another --out, or remove it.")
    check_is_bundle(bundle)
    place.check(resume)
    rows = read_rows(Path(data))
    model = load(bundle, keys, enclave, training_dtype(bundle, dtype), vendor_key, threads=threads, lease=lease)
    try:
        # Only now are the bundle's files known to be the vendor's.
        say(session_of(model).client.welcome.enclave)
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(bundle))
        context = session_of(model).client.welcome.context
        max_length = settings.max_length or min(LONGEST, context)
        if max_length > context:
            raise SemiopenError(f"--max-length {max_length} is more than the context of {context}; give less.")
        examples = encode(rows, tokenizer, max_length, settings.loss)
        learned, held_back = split_examples(len(examples), settings.eval_share, settings.seed)
        say_data(say, examples, len(learned), len(held_back), max_length)
        place.begin(_identity(model, examples, settings))
        try:
            return _run(
                bundle, model, examples, learned, held_back, settings, out, place, states, keep_states, progress, say
            )
        except BaseException:
            say(f"What is done is kept in {place.folder}; the same command with --resume goes on from there.")
            raise
    finally:
        model.enclave.close()  # type: ignore[operator, union-attr]


def split_examples(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the examples to learn, and of those to hold back; the same for the same seed.

    Raises:
        SemiopenError: there is only one example, and it cannot be both.
    """
    aside = max(1, round(count * share)) if share else 0
    if aside >= count:
        raise SemiopenError(
            f"There are too few examples ({count}) to hold any back for evaluation; give more, a smaller --max-length "
            "for a text file, or --eval-share 0."
        )
    order = np.random.default_rng((seed, 0x5EED)).permutation(count)
    return np.sort(order[aside:]), np.sort(order[:aside])


def _run(
    bundle: Path,
    model: PreTrainedModel,
    examples: Examples,
    learned: np.ndarray,
    held_back: np.ndarray,
    settings: TuneSettings,
    out: Path,
    place: WorkFolder,
    kept: StatesPlace,
    keep_states: bool,
    progress: Progress,
    say: Say,
) -> TuneResult:
    peft = add_lora(model, settings)  # before the enclave is asked: a wrong target must cost no tokens
    began = time.perf_counter()
    prefix = states_of(model, examples, place.folder / STATES_FOLDER if kept == "disk" else None, progress)
    passes = getattr(model, "unmixer", None) is not None  # kv: enclave
    if not passes:
        model.enclave.close()  # type: ignore[operator, union-attr] - nothing below is the enclave's
    states_seconds = time.perf_counter() - began
    say(
        f"The enclave ran {prefix.spent:,} tokens"
        + (f"; {prefix.reused:,} were there from an earlier run" if prefix.reused else "")
        + (
            ". Attention passes through it while training, which it does not count."
            if passes
            else ". It is closed: training needs no more of it."
        )
    )
    train_data, eval_data = (StatesDataset(examples, prefix.states, part) for part in (learned, held_back))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    peft.to(accelerator or torch.device("cpu"))
    before = place.remembered("loss_before", lambda: mean_loss(peft, eval_data, settings.batch_size))
    if before is not None:
        say(f"Loss of the examples held back, before: {before:.4f} nats per token")

    told = max(1, round(settings.epochs / 10))  # ten lines at most

    def on_epoch(epoch: float, loss: float | None) -> None:
        if loss is not None and round(epoch) % told == 0:
            say(f"after epoch {epoch:g}: {loss:.4f}")

    began = time.perf_counter()
    steps = train(
        peft,
        train_data,
        eval_data,
        settings,
        place.folder / CHECKPOINTS_FOLDER,
        lambda done, total: progress("training", done, total),
        on_epoch,
    )
    training_seconds = time.perf_counter() - began
    after = mean_loss(peft, eval_data, settings.batch_size)
    check_finite(peft, after)
    result = TuneResult(
        examples=len(learned),
        held_back=len(held_back),
        tokens=examples.tokens,
        learned_tokens=int(sum(examples.learned[examples.span(index)].sum() for index in learned)),
        truncated=examples.truncated,
        dropped=examples.dropped,
        enclave_tokens=prefix.spent,
        reused_tokens=prefix.reused,
        loss_before=before,
        loss_after=after,
        steps=steps,
        trained_parameters=sum(p.numel() for p in peft.parameters() if p.requires_grad),
        states_seconds=round(states_seconds, 3),
        training_seconds=round(training_seconds, 3),
    )
    record = {
        "semiopen": VERSION,
        "bundle_digest": session_digest(place),
        "split": split_of(bundle),
        "dtype": str(model.dtype).removeprefix("torch."),
        "settings": asdict(settings),
        "result": asdict(result),
    }
    save_adapter(peft, out, record, _card(model, settings, result))
    place.end(keep_states)
    return result


def states_of(
    model: PreTrainedModel, examples: Examples, folder: Path | None, progress: Progress = lambda *_: None
) -> PrefixStates:
    """The prefix's states of all examples, from a model whose enclave is still open; see `compute_states`."""
    session = session_of(model)
    agree_on_score_cap(session, model)
    welcome = session.client.welcome
    facts = [welcome.bundle_digest, welcome.dtype, session.score_cap, examples.ids_digest()]
    return compute_states(session, examples, folder, _sha256(facts), progress)


def session_digest(place: WorkFolder) -> str:
    """Digest of the bundle that a run is for."""
    return place.facts["identity"]["bundle"]


def _identity(model: PreTrainedModel, examples: Examples, settings: TuneSettings) -> dict[str, Any]:
    """All that decides what an adapter becomes."""
    welcome = session_of(model).client.welcome
    return {"bundle": welcome.bundle_digest, "dtype": welcome.dtype, "data": examples.digest(), **asdict(settings)}


def training_dtype(bundle: Path, dtype: str | None) -> str | None:
    """The dtype to train in; None for the bundle's own.

    Raises:
        SemiopenError: float16.
    """
    if dtype == "float16":
        raise SemiopenError("Gradients leave the range of float16; give --dtype float32 or bfloat16.")
    if dtype is None:
        # Not verified yet, and nothing hangs on it but the dtype, which the enclave has to share.
        own = json.loads(read_file(bundle, "config.json")).get("text_config", {}).get("dtype")
        return "float32" if own == "float16" else None
    return dtype


def say_data(say: Say, examples: Examples, learned: int, held_back: int, max_length: int) -> None:
    """Tell how many examples there are, and what happened to the others."""
    counts = f"{learned:,} examples to learn, {held_back:,} held back for evaluation; {examples.tokens:,} tokens."
    if examples.truncated:
        counts += f" {examples.truncated:,} were longer than {max_length:,} tokens and lost their end (--max-length)."
    if examples.dropped:
        counts += f" {examples.dropped:,} were left out: nothing to learn within {max_length:,} tokens."
    say(counts)


def check_finite(model: torch.nn.Module, loss: float | None) -> None:
    """Refuse a result that is not numbers.

    Raises:
        SemiopenError: it is not.
    """
    if (loss is not None and not math.isfinite(loss)) or not all(
        bool(parameter.isfinite().all()) for parameter in model.parameters() if parameter.requires_grad
    ):
        raise SemiopenError("Training has diverged; remove the work folder and give a lower --lr, or --dtype float32.")


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _card(model: PreTrainedModel, settings: TuneSettings, result: TuneResult) -> str:
    """README.md of the adapter. Says nothing about the data but its size."""
    name = str(model.config.name_or_path)
    targets = settings.targets if isinstance(settings.targets, str) else ", ".join(settings.targets)
    loss = (
        "none was held back"
        if result.loss_after is None
        else f"{result.loss_before:.4f} before, {result.loss_after:.4f} after (nats per token, {result.held_back} "
        "examples held back)"
    )
    return f"""---
base_model: {json.dumps(name)}
library_name: peft
pipeline_tag: text-generation
tags: [lora, semiopen]
---

# Adapter for {Path(name).name}

LoRA on the open blocks of a [semiopen](https://pypi.org/project/semiopen/) bundle, made by `semiopen tune` {VERSION}.
Its blocks are numbered from 0 above the sealed ones, so it fits this bundle's split and no other.

**It was trained on private data, and adapters can give back what they were trained on.** Treat it as that data.

```console
$ semiopen generate BUNDLE --keys KEYS --adapter THIS_FOLDER --prompt "..."
$ semiopen serve BUNDLE --keys KEYS --adapter THIS_FOLDER
```

```python
import semiopen
from peft import PeftModel

model = PeftModel.from_pretrained(semiopen.load("BUNDLE", keys="KEYS"), "THIS_FOLDER")
```

| | |
| --- | --- |
| LoRA | rank {settings.rank}, alpha {settings.alpha:g}, dropout {settings.dropout:g}, on {targets} |
| training | {settings.epochs:g} epochs, {result.steps} steps of {settings.batch_size * settings.accumulate} examples, \
learning rate {settings.learning_rate:g}, seed {settings.seed} |
| data | {result.examples} examples, {result.learned_tokens} tokens learned |
| loss | {loss} |
"""
