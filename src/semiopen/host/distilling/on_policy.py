"""Batches that the student writes itself: prompts from the data, completions sampled from the student."""

from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel

from semiopen.host.distilling.batches import collate
from semiopen.host.tuning.batches import IGNORED


def sampled_batch(
    student: PreTrainedModel, batch: dict[str, Any], seed: int, max_new_tokens: int, max_length: int
) -> dict[str, Any]:
    """Replace what is learned of a batch by what the student writes.

    An example's prompt is all before its first learned token: of a text, its first token. The student samples from
    its own distribution, at temperature 1 and over the whole vocabulary, up to an end token.

    Args:
        student: the model, or PEFT's around it.
        batch: from `batches.collate`.
        seed: of the sampling; torch's own generator is left as it was.
        max_new_tokens: longest completion.
        max_length: longest prompt and completion together.

    Returns:
        A batch of the same rows, without targets, on the same device.
    """
    prompts = [
        ids[: int((labels != IGNORED).nonzero()[0])]
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    written = _write(student, prompts, seed, max_new_tokens, max_length)
    items = []
    for prompt, completion in zip(prompts, written, strict=True):
        ids = torch.cat([prompt, completion])
        labels = ids.clone()
        labels[: len(prompt)] = IGNORED
        items.append((ids, labels, None))
    return {name: value.to(batch["input_ids"].device) for name, value in collate(items).items()}


def _write(
    student: PreTrainedModel, prompts: list[torch.Tensor], seed: int, max_new_tokens: int, max_length: int
) -> list[torch.Tensor]:
    """Completions with their end token, if they come to one. At least one token each."""
    own = cast(GenerationConfig, student.generation_config)
    ends = torch.atleast_1d(torch.tensor([] if own.eos_token_id is None else own.eos_token_id)).long()
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=prompts[0].device)
    longest = int(lengths.max())
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
    mask = torch.arange(longest, device=ids.device) >= longest - torch.tensor([[len(p)] for p in prompts]).to(
        ids.device
    )
    sampling = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max(1, min(max_new_tokens, max_length - longest)),
        eos_token_id=ends.tolist() or None,
        pad_token_id=0,  # only behind an end token, where it is cut off
    )
    training = student.training
    student.eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        found = cast(Any, student).generate(input_ids=ids, attention_mask=mask.long(), generation_config=sampling)
    student.train(training)
    completions = []
    for row in cast(torch.Tensor, found)[:, longest:]:
        stops = torch.isin(row, ends.to(row.device)).nonzero()[:, 0]
        completions.append(row[: int(stops[0]) + 1] if len(stops) else row)
    return completions
