"""The training loop: LoRA with PEFT and transformers' Trainer, over stored states. No enclave is near."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.pytorch_utils import Conv1D

from semiopen.errors import SemiopenError
from semiopen.host.tuning.batches import IGNORED, LengthGroups, StatesDataset, collate
from semiopen.host.tuning.settings import TrainSettings, TuneSettings
from semiopen.model.families import FAMILIES

_EXPERT_NAMES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
_COMPLETE = "complete"  # marks a checkpoint that was written to its end

EpochDone = Callable[[float, float | None], object]


def add_lora(model: PreTrainedModel, settings: TuneSettings) -> PeftModel:
    """Put LoRA layers on the open blocks; nothing else is trained.

    Raises:
        SemiopenError: there is no open block, or no module of that name in one.
    """
    if not model.config.num_hidden_layers:
        raise SemiopenError("All blocks of this bundle are sealed, so there is nothing to tune; ask for another plan.")
    # Not PEFT's own all-linear, which may write down full names; engines look for short ones.
    known = linear_names(model)
    targets = known if settings.targets == "all-linear" else list(settings.targets)
    if unknown := [name for name in targets if name not in known]:
        raise SemiopenError(f"No linear layer is named {unknown[0]}; --targets may name: {', '.join(known)}.")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=cast(int, settings.alpha),
        lora_dropout=settings.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    set_seed(settings.seed)
    return cast(PeftModel, get_peft_model(model, config))


def linear_names(model: PreTrainedModel) -> list[str]:
    """Short names of the linear layers in the open blocks, such as q_proj; the head is none of them.

    Of models with experts the attention's only: PEFT would take their other names for those of the experts.
    """
    blocks = cast(torch.nn.Module, getattr(model.base_model, FAMILIES[model.config.model_type].layers))
    experts = any(getattr(model.config, name, None) for name in ("num_experts", "num_local_experts"))
    kinds = (torch.nn.Linear, Conv1D)
    found = {name.rpartition(".")[2] for name, module in blocks.named_modules() if isinstance(module, kinds)}
    return sorted(found - _EXPERT_NAMES if experts else found)


def train(
    model: PeftModel,
    data: StatesDataset,
    held_back: StatesDataset,
    settings: TuneSettings,
    folder: Path,
    on_step: Callable[[int, int], object],
    on_epoch: EpochDone,
) -> int:
    """Train the adapter; go on from the last whole checkpoint in `folder` if there is one.

    Args:
        model: from `add_lora`.
        data: what to learn.
        held_back: what to compute the loss of after each epoch; may be empty.
        settings: of the run; the same as those of its checkpoints.
        folder: of checkpoints.
        on_step: told the optimiser steps done, and of all.
        on_epoch: told the epoch, and the loss of `held_back` (nats per token; None if empty).

    Returns:
        Optimiser steps of the whole run.
    """
    trainer = TuneTrainer(
        model=model,
        args=training_arguments(settings, folder, model.dtype),
        train_dataset=data,
        data_collator=cast(Any, collate),
        callbacks=[
            ProgressCallback(on_step, lambda epoch: on_epoch(epoch, mean_loss(model, held_back, settings.batch_size)))
        ],
    )
    trainer.remove_callback(PrinterCallback)
    last = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    return trainer.state.global_step


def training_arguments(settings: TrainSettings, folder: Path, dtype: torch.dtype) -> TrainingArguments:
    """The settings of a run as transformers' Trainer takes them; checkpoints go to `folder`."""
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup,
        lr_scheduler_type=settings.schedule,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        bf16=dtype == torch.bfloat16,
        use_cpu=not torch.accelerator.is_available(),
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        save_steps=settings.save_every,
        save_total_limit=2,  # the one before stays until the next is whole
        logging_strategy="no",
        seed=settings.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )


def mean_loss(model: torch.nn.Module, data: StatesDataset, batch_size: int) -> float | None:
    """Mean loss of the learned tokens, in nats per token; None without examples. Leaves no trace in random numbers."""
    if not len(data):
        return None
    device = next(model.parameters()).device
    half = next((p.dtype for p in model.parameters() if p.dtype == torch.bfloat16), None)
    autocast = torch.autocast(device.type, dtype=half) if half else contextlib.nullcontext()
    was_training, total, tokens = model.training, 0.0, 0
    model.eval()
    order = np.argsort(-data.lengths, kind="stable")
    with torch.no_grad(), autocast:
        for begin in range(0, len(order), batch_size):
            batch = collate([data[int(place)] for place in order[begin : begin + batch_size]])
            count = int((batch["shift_labels"] != IGNORED).sum())
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False).loss
            total, tokens = total + loss.item() * count, tokens + count
    model.train(was_training)
    return total / tokens


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{_COMPLETE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class TuneTrainer(Trainer):
    """Trainer with batches of like length; its data set has `lengths`."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> LengthGroups:
        data = cast(StatesDataset, train_dataset if train_dataset is not None else self.train_dataset)
        return LengthGroups(data.lengths, self.args.train_batch_size, self.args.seed)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: transformers counts by token ids, of which there are none here."""
        return 0


class ProgressCallback(TrainerCallback):
    """Says how far it is, and marks checkpoints that are whole.

    `on_step` is told the optimiser steps done, and of all; `on_epoch` the epoch that ends.
    """

    def __init__(self, on_step: Callable[[int, int], object], on_epoch: Callable[[float], object]) -> None:
        self._on_step, self._on_epoch = on_step, on_epoch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Show where a resumed run begins."""
        self._on_step(state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Show the step."""
        self._on_step(state.global_step, state.max_steps)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Evaluate."""
        self._on_epoch(state.epoch or 0.0)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Mark the checkpoint; a killed process may leave one without a mark."""
        (Path(cast(str, args.output_dir)) / f"checkpoint-{state.global_step}" / _COMPLETE).touch()
