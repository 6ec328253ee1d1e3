"""Prompts for vLLM: short and long ones; some share a beginning that fills blocks; some leave every sliding window."""

import torch


def _drawn() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    draw = lambda count: torch.randint(3, 199, (count,), generator=generator).tolist()  # noqa: E731
    shared = draw(70)
    return [draw(1), draw(5), draw(40), shared + draw(3), shared + draw(30), draw(120), shared + draw(50), draw(17)]


PROMPTS = _drawn()
FEW = PROMPTS[:6]
