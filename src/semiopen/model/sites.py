"""Which exact symmetries each family has, and which of its tensors they touch.

A tensor's axis lies in a space: the residual stream, the query heads, the channels of a feed-forward. A symmetry
changes the basis of a space, so it is enough to know the spaces of each tensor's axes. `symmetries.py` draws the bases
and applies them.

Why a stream has the kind it has. A residual stream may be rotated when all that reads it commutes with a rotation:
an RMSNorm does once its gain is in the matrix behind it. A gain on a sublayer's OUTPUT (Gemma 2 and 3, OLMo 2) has no
linear map behind it but the stream itself, and only commutes with permutations and signs. A LayerNorm subtracts the
mean, which a permutation keeps and a sign does not. (A rotation that fixes the mean's direction would be exact there,
were the final norm's bias not without a bias behind it to go into.)
"""

from dataclasses import dataclass
from enum import Enum

from transformers import PreTrainedConfig

from semiopen.model.split import check_supported


class Axis(Enum):
    """The space of an axis, and with it what happens to that axis."""

    KEPT = "kept"  # vocabulary, positions, the inside of a head
    STREAM = "stream"
    GAIN = "gain"  # factors on the stream, which a sign leaves alone
    QUERY = "query"  # query heads
    KEY = "key"  # key and value heads
    QKV = "query, key, value"  # one after the other in one tensor
    TRIPLES = "query, key and value of each head"  # head after head
    INNER = "inner"  # channels of a feed-forward, permuted
    UP = "up"  # the same, and scaled where the feed-forward is gated
    DOWN = "down"  # the same, and scaled back
    GATE_UP = "gate, up"  # INNER and UP, one after the other
    EXPERT = "expert"


@dataclass(frozen=True)
class Site:
    """A matrix: the spaces of its axes, as PyTorch's Linear stores it, [out, in].

    Attributes:
        out, into: the space that it writes, and the one that it reads. A bias is in `out`.
        norm: which norm stands before it: "attention" or "mlp". Its gain goes along `into`.
        transposed: stored [in, out], as GPT-2's Conv1D does.
    """

    out: Axis
    into: Axis
    norm: str | None = None
    transposed: bool = False


_QUERY = Site(Axis.QUERY, Axis.STREAM, "attention")
_KEY = Site(Axis.KEY, Axis.STREAM, "attention")
_ATTENTION_OUT = Site(Axis.STREAM, Axis.QUERY)
_GATE = Site(Axis.INNER, Axis.STREAM, "mlp")
_UP = Site(Axis.UP, Axis.STREAM, "mlp")
_DOWN = Site(Axis.STREAM, Axis.DOWN)
_GATE_UP = Site(Axis.GATE_UP, Axis.STREAM, "mlp")
_ROUTER = Site(Axis.EXPERT, Axis.STREAM, "mlp")

# By name within a block, without the number of an expert. No two families use one name for different things.
SITES: dict[str, Site] = {
    "self_attn.q_proj": _QUERY,
    "self_attn.k_proj": _KEY,
    "self_attn.v_proj": _KEY,
    "self_attn.qkv_proj": Site(Axis.QKV, Axis.STREAM, "attention"),
    "self_attn.o_proj": _ATTENTION_OUT,
    "mlp.gate_proj": _GATE,
    "mlp.up_proj": _UP,
    "mlp.gate_up_proj": _GATE_UP,
    "mlp.down_proj": _DOWN,
    "mlp.gate": _ROUTER,
    "mlp.experts.gate_proj": _GATE,
    "mlp.experts.up_proj": _UP,
    "mlp.experts.gate_up_proj": _GATE_UP,
    "mlp.experts.down_proj": _DOWN,
    "block_sparse_moe.gate": _ROUTER,
    "block_sparse_moe.experts.w1": _GATE,
    "block_sparse_moe.experts.w3": _UP,
    "block_sparse_moe.experts.w2": _DOWN,
    "attn.c_attn": Site(Axis.QKV, Axis.STREAM, transposed=True),
    "attn.c_proj": Site(Axis.STREAM, Axis.QUERY, transposed=True),
    "mlp.c_fc": Site(Axis.UP, Axis.STREAM, transposed=True),
    "mlp.c_proj": Site(Axis.STREAM, Axis.DOWN, transposed=True),
    "attention.query_key_value": Site(Axis.TRIPLES, Axis.STREAM),
    "attention.dense": _ATTENTION_OUT,
    "mlp.dense_h_to_4h": Site(Axis.UP, Axis.STREAM),
    "mlp.dense_4h_to_h": _DOWN,
}

# Buffers that old checkpoints carry in their blocks: masks and frequencies, the same in every model.
CONSTANTS = {
    "attn.bias",
    "attn.masked_bias",
    "attention.bias",
    "attention.masked_bias",
    "attention.rotary_emb.inv_freq",
    "self_attn.rotary_emb.inv_freq",
}


class Stream(Enum):
    """How a family's residual stream may be turned. The value says it in words."""

    ROTATED = "rotated by a dense orthogonal matrix"
    SIGNED = "permuted with signs: a gain acts on what a sublayer writes, which a rotation would not leave exact"
    PERMUTED = "permuted: LayerNorm subtracts the mean, which signs and rotations would change"


@dataclass(frozen=True)
class Layout:
    """What is exact in a family.

    Attributes:
        stream: how the residual stream is turned.
        norms: the norms whose gain goes into the matrices behind it: "attention", "mlp" -> name in a block.
        fold_final: the final norm's gain goes into the head.
        unit: a norm's weight that stands for a gain of one.
        gated: the feed-forward multiplies two projections, so one of them may be scaled.
        grouped: query heads may share a key-value head, if the config says so.
        head_norms: space of the weights of q_norm and k_norm.
        passed: other norms in a block: space of their weights and biases.
    """

    stream: Stream = Stream.ROTATED
    norms: tuple[tuple[str, str], ...] = (("attention", "input_layernorm"), ("mlp", "post_attention_layernorm"))
    fold_final: bool = True
    unit: float = 1.0
    gated: bool = True
    grouped: bool = True
    head_norms: tuple[Axis, Axis] = (Axis.KEPT, Axis.KEPT)
    passed: tuple[str, ...] = ()


_GEMMA = Layout(
    stream=Stream.SIGNED,
    norms=(("attention", "input_layernorm"), ("mlp", "pre_feedforward_layernorm")),
    unit=0.0,
    passed=("post_attention_layernorm", "post_feedforward_layernorm"),
)
_ROTATED = Layout()

LAYOUTS: dict[str, Layout] = {
    "llama": _ROTATED,
    "mistral": _ROTATED,
    "qwen2": _ROTATED,
    "qwen3": _ROTATED,
    "phi3": _ROTATED,
    "mixtral": _ROTATED,
    "qwen3_moe": _ROTATED,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": Layout(
        stream=Stream.SIGNED,
        norms=(),
        head_norms=(Axis.QUERY, Axis.KEY),
        passed=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "gpt2": Layout(
        stream=Stream.PERMUTED, norms=(), fold_final=False, gated=False, grouped=False, passed=("ln_1", "ln_2")
    ),
    "gpt_neox": Layout(
        stream=Stream.PERMUTED,
        norms=(),
        fold_final=False,
        gated=False,
        grouped=False,
        passed=("input_layernorm", "post_attention_layernorm"),
    ),
}


def kv_heads(config: PreTrainedConfig) -> int:
    """Key and value heads of a block."""
    groups = getattr(config, "num_key_value_heads", None) if LAYOUTS[config.model_type].grouped else None
    return groups or config.num_attention_heads


def experts(config: PreTrainedConfig) -> int:
    """Experts of a block that has any; 0 in families without."""
    return getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0


def describe(config: PreTrainedConfig) -> dict[str, str]:
    """Which symmetries a keyed model of this config gets, in words, by where they act.

    Raises:
        UnsupportedModelError: the model cannot be sealed.
    """
    check_supported(config)
    layout = LAYOUTS[config.model_type]
    groups, heads = kv_heads(config), config.num_attention_heads
    if layout.fold_final:
        gains = "folded into the matrices behind them" if layout.norms else "the final one folded into the head"
        gains += "; those on a sublayer's output permuted" if layout.passed else ""
    else:
        gains = "permuted, as are the biases"
    if groups == heads:
        order = f"{heads} heads permuted"
    elif groups == 1:
        order = f"{heads} query heads of one key head permuted"
    else:
        order = f"{groups} groups permuted, and the {heads // groups} query heads inside each"
    if layout.gated:
        channels = "permuted; up scaled by plus or minus 1/2, 1 or 2, and down scaled back"
    else:
        channels = "permuted: its activation lets no scale or sign through"
    rows = {
        "residual stream": layout.stream.value,
        "norm gains": gains,
        "attention heads": order,
        "feed-forward channels": channels,
    }
    if experts(config):
        rows["experts"] = f"{experts(config)} permuted, with the router's rows"
    return rows
