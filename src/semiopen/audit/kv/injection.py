"""Injection: go on from the stolen cache with an instruction to repeat what was said, and read the answer.

After "Shadow in the Cache" (arXiv 2508.09442). It needs a model that follows; and states of the instruction's tokens,
which through sealed blocks are those of the instruction by itself, as the sealed blocks' own cache is not stolen.
"""

import torch
from transformers import DynamicCache

from semiopen.audit.kv.below import Below
from semiopen.audit.kv.dump import Dump
from semiopen.audit.kv.recovered import Recovered
from semiopen.audit.weights.layout import HEAD
from semiopen.errors import SemiopenError
from semiopen.model.parts import Upper


def run(dump: Dump, below: Below, instruction: torch.Tensor, skips: int = 1) -> Recovered:
    """Attack.

    Args:
        dump: all its open blocks' caches are used.
        below: gives the instruction's states.
        instruction: [I] token ids.
        skips: with which of the conversation's tokens the answer is taken to begin.

    Raises:
        SemiopenError: the head is not open, or no block is.
    """
    if HEAD not in dump.tensors or not dump.keys:
        raise SemiopenError("Without an open head and an open block nothing can go on from the cache.")
    upper = Upper(dump.config, dump.first, dict(dump.tensors))
    cache = DynamicCache(config=upper.model.config)
    for number, (key, value) in enumerate(zip(dump.keys, dump.values, strict=True)):
        cache.update(key[None], value[None], number)
    ids, new = instruction, len(instruction)
    with torch.inference_mode():
        while len(ids) < len(instruction) + dump.length - skips:
            states = below.all_states(ids[None])[:, -new:]
            logits = upper.model(inputs_embeds=states, past_key_values=cache, use_cache=True).logits
            ids, new = torch.cat([ids, logits[0, -1:].argmax(-1)]), 1
    said = ids[len(instruction) :]
    return Recovered("injection", said, torch.arange(skips, skips + len(said)), skips, below.asked)
