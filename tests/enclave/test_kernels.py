"""The faster modules compute what the family's own do, for every family."""

import numpy as np
import pytest
import torch
from torch import nn

from semiopen.enclave import kernels, prefix
from semiopen.enclave.kernels import FusedNorm, LinearPart, PackedLinear
from semiopen.enclave.prefix import Prefix
from semiopen.enclave.trusted_state import CheckedStep
from semiopen.model.packed_step import slots_of
from semiopen.model.paged_attention import KVCache
from semiopen.model.split import cut_layers, split_config
from tests.models import FAMILIES, VOCAB, random_model

SIZE = 8  # tokens in a KV block
LENGTHS = [21, 3, 40, 1]
PREFIX = 2


def make_prefix(family: str) -> Prefix:
    model = random_model(FAMILIES[family])
    split = split_config(model.config, PREFIX)
    names = [name for name in model.state_dict() if split.place(name).part.name in ("SEALED", "TIED")]
    tensors = {name: model.state_dict()[name].clone() for name in names if name != "lm_head.weight"}
    built = Prefix(cut_layers(model.config, 0, PREFIX), tensors, torch.float32)
    assert tensors == {}, "weights that are held twice"
    return built


def run(built: Prefix, cache: KVCache, rows: list[int], new: list[int], done: list[int]) -> torch.Tensor:
    """Run the next `new` tokens of some rows of one fixed batch of texts."""
    texts = np.random.default_rng(0).integers(3, VOCAB, size=(len(LENGTHS), 64))
    ids = np.concatenate([texts[row, begin : begin + n] for row, n, begin in zip(rows, new, done, strict=True)])
    starts = np.cumsum([0, *new])
    lengths = np.array([n + begin for n, begin in zip(new, done, strict=True)])
    tables = np.array([[row * 8 + block for block in range(8)] for row in rows])[None]
    positions, slots = slots_of(tables, starts, lengths, SIZE)
    no_copies = np.empty((0, 2), dtype=np.int64)
    step = CheckedStep(ids, positions, starts, lengths, tables, slots, (), no_copies, SIZE, True)
    with torch.inference_mode():
        return built.run(step, cache).float()


def conversation(built: Prefix, rows: list[int]) -> list[torch.Tensor]:
    """Per row: states of its prompt, of five tokens at once, and of one."""
    cache = KVCache(32, SIZE)
    states: list[list[torch.Tensor]] = [[] for _ in rows]
    done = [0] * len(rows)
    for new in ([LENGTHS[row] for row in rows], [5] * len(rows), [1] * len(rows), [1] * len(rows)):
        out = run(built, cache, rows, new, done)
        for kept, part in zip(states, out.split(new), strict=True):
            kept.append(part)
        done = [a + b for a, b in zip(done, new, strict=True)]
    return [torch.cat(parts) for parts in states]


@pytest.fixture
def packs_all(monkeypatch):
    """Small weights are packed as well."""
    monkeypatch.setattr(kernels, "_LEAST_FP32", 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_the_family_s_own_modules(family, packs_all, monkeypatch):
    packed = make_prefix(family)
    monkeypatch.setattr(prefix, "speed_up", lambda *_: None)
    own = make_prefix(family)
    kinds = [type(module) for module in packed.model.modules()]
    assert PackedLinear in kinds
    assert nn.Linear not in kinds
    for a, b in zip(conversation(packed, [0, 1, 2, 3]), conversation(own, [0, 1, 2, 3]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_rms_norms_are_fused_and_exact_in_fp32(family):
    for module in make_prefix(family).model.modules():
        assert not type(module).__name__.endswith("RMSNorm")


def test_a_row_depends_on_the_others_by_rounding_only(packs_all):
    built = make_prefix("qwen3")
    together = conversation(built, [0, 1, 2, 3])
    for row, states in enumerate(together):
        (alone,) = conversation(built, [row])
        torch.testing.assert_close(alone, states, rtol=1e-4, atol=1e-4)


def test_siblings_are_merged_where_they_fit(packs_all):
    layer = make_prefix("qwen2-bias").model.layers[0]
    assert all(type(getattr(layer.self_attn, name)) is LinearPart for name in ("q_proj", "k_proj", "v_proj"))
    assert all(type(getattr(layer.mlp, name)) is LinearPart for name in ("gate_proj", "up_proj"))


def test_siblings_that_do_not_fit_stay_apart(packs_all):
    module = nn.Module()
    module.gate_proj, module.up_proj = nn.Linear(16, 8, bias=True), nn.Linear(16, 8, bias=False)
    x = torch.randn(3, 16)
    with torch.inference_mode():
        expected = module.gate_proj(x), module.up_proj(x)
        kernels.speed_up(module, torch.float32)
        assert type(module.gate_proj) is PackedLinear
        torch.testing.assert_close((module.gate_proj(x), module.up_proj(x)), expected)


def test_merging_changes_no_bit(packs_all):
    module = nn.Module()
    module.gate_proj, module.up_proj = nn.Linear(64, 48), nn.Linear(64, 80)
    alone = [PackedLinear(part.weight.detach(), part.bias.detach()) for part in (module.gate_proj, module.up_proj)]
    kernels.speed_up(module, torch.float32)
    with torch.inference_mode():
        for rows in (1, 2, 7, 64):
            x = torch.randn(rows, 64)
            assert torch.equal(module.gate_proj(x), alone[0](x))
            assert torch.equal(module.up_proj(x), alone[1](x))


def test_a_norm_that_would_differ_is_left(monkeypatch):
    class OtherRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.rand(16)), 1e-6

        def forward(self, x):
            return x * self.weight

    module = nn.Module()
    module.norm = OtherRMSNorm()
    with torch.inference_mode():
        kernels.speed_up(module, torch.float32)
    assert not isinstance(module.norm, FusedNorm)
