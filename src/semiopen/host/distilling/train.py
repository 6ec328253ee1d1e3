"""The training loop: transformers' Trainer with a teacher beside it."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PrinterCallback

from semiopen.errors import EnclaveError
from semiopen.host.distilling.batches import DistilDataset, collate
from semiopen.host.distilling.losses import TopK, cross_entropy, divergence
from semiopen.host.distilling.on_policy import sampled_batch
from semiopen.host.distilling.settings import DistilSettings
from semiopen.host.distilling.teacher import learned_logits
from semiopen.host.tuning.batches import IGNORED
from semiopen.host.tuning.train import ProgressCallback, TuneTrainer, last_checkpoint, training_arguments

Teach = Callable[[dict[str, Any]], torch.Tensor]  # a batch -> logits [M, V] of its learned tokens


def train(
    student: torch.nn.Module,
    teach: Teach,
    data: DistilDataset,
    settings: DistilSettings,
    max_length: int,
    folder: Path,
    dtype: torch.dtype,
    on_step: Callable[[int, int], object],
    on_epoch: Callable[[float], object],
) -> int:
    """Train a student; go on from the last whole checkpoint in `folder` if there is one.

    Args:
        student: from `load_student`.
        teach: the teacher; asked about batches whose targets are not kept.
        data: what to learn.
        settings: of the run; the same as those of its checkpoints.
        max_length: longest text, where the student writes.
        folder: of checkpoints.
        dtype: bfloat16 computes the student's passes in it; its weights stay in float32.
        on_step: told the optimiser steps done, and of all.
        on_epoch: told the epoch.

    Returns:
        Optimiser steps of the whole run.

    Raises:
        EnclaveError: the teacher refuses, or is gone. A checkpoint has been written: no answer is paid for twice.
    """
    trainer = DistilTrainer(
        teach,
        settings,
        max_length,
        model=cast(PreTrainedModel, student),
        args=training_arguments(settings, folder, dtype),
        train_dataset=data,
        data_collator=cast(Any, collate),
        callbacks=[ProgressCallback(on_step, on_epoch)],
    )
    trainer.remove_callback(PrinterCallback)
    last = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    return trainer.state.global_step


class DistilTrainer(TuneTrainer):
    """Trainer whose loss is the divergence from a teacher, per learned token."""

    def __init__(self, teach: Teach, settings: DistilSettings, max_length: int, **options: Any) -> None:
        super().__init__(**options)
        self._teach, self._settings, self._max_length = teach, settings, max_length
        self.loss_is_scaled_for_ga = True  # by the learned tokens of the whole step

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The batches of one step, some of them written by the student, and how many tokens are learned in all.

        Which, and what is written, depends on the seed and the step alone, so that a resumed run does the same.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for place, batch in enumerate(batches):
            draw = np.random.default_rng((self._settings.seed, 0x0511, self.state.global_step, place))
            batch["from_data"] = draw.random() >= self._settings.on_policy
            if not batch["from_data"]:
                with self.compute_loss_context_manager():
                    batches[place] = sampled_batch(
                        cast(PreTrainedModel, self.model),
                        batch,
                        int(draw.integers(1 << 62)),
                        self._settings.max_new_tokens,
                        self._max_length,
                    )
                batches[place]["from_data"] = False
        counts = [int((batch["shift_labels"] != IGNORED).sum()) for batch in batches]
        return batches, torch.tensor(sum(counts), device=device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Nats per learned token of the step. The teacher comes first: where it refuses, nothing has been done."""
        settings, labels = self._settings, inputs["shift_labels"]
        truth = settings.truth if inputs["from_data"] else 0.0  # a student's own text is nobody's truth
        teacher = None
        if truth < 1:
            try:
                teacher = self._targets(inputs)
            except EnclaveError:
                self._keep()
                raise
        logits = learned_logits(model, inputs)
        total = logits.new_zeros((), dtype=torch.float32)
        if teacher is not None:
            total = total + (1 - truth) * divergence(logits, teacher, settings.mixing, settings.temperature)
        if truth > 0:
            total = total + truth * cross_entropy(logits, labels[labels != IGNORED])
        return total / cast(torch.Tensor, num_items_in_batch)

    def _targets(self, inputs: dict[str, Any]) -> torch.Tensor | TopK:
        if "teacher_ids" in inputs:
            return TopK(inputs["teacher_ids"], inputs["teacher_log_probs"])
        return self._teach(inputs)

    def _keep(self) -> None:
        """Write a checkpoint between two steps, unless there is one."""
        folder = Path(cast(str, self.args.output_dir))
        last = last_checkpoint(folder)
        if self.state.global_step and (last is None or last.name != f"checkpoint-{self.state.global_step}"):
            self._save_checkpoint(cast(Any, self.model), None)
            self.callback_handler.on_save(self.args, self.state, self.control)


def compare(
    student: torch.nn.Module, data: DistilDataset, settings: DistilSettings, dtype: torch.dtype
) -> tuple[float, float]:
    """How far a student is from a teacher whose targets are kept.

    Returns:
        Forward KL in nats per learned token, at the targets' temperature; and the share of learned tokens at which
        both have the same likeliest one.
    """
    device = next(student.parameters()).device
    autocast = torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext()
    was_training, far, same, tokens = student.training, 0.0, 0, 0
    student.eval()
    order = np.argsort(-data.lengths, kind="stable")
    with torch.no_grad(), autocast:
        for begin in range(0, len(order), settings.batch_size):
            batch = collate([data[int(place)] for place in order[begin : begin + settings.batch_size]])
            batch = {name: value.to(device) for name, value in batch.items()}
            logits = learned_logits(student, batch)
            teacher = TopK(batch["teacher_ids"], batch["teacher_log_probs"])
            far += divergence(logits, teacher, 0.0, settings.temperature).item()
            same += int((logits.argmax(dim=1) == teacher.ids[:, 0]).sum())
            tokens += len(logits)
    student.train(was_training)
    return far / tokens, same / tokens
