"""The door: every message that may cross the trust boundary, and nothing else.

Control messages are JSON, parsed strictly into the types below; unknown fields, kinds and types are refused.
Tensors never travel here: they lie in the shared memory described by `channel`, whose descriptor comes with
`Opened`. One request, one reply, in order; a reply is the one named for the request, or `Failed`.

    request   reply       meaning
    Hello     Welcome     who are you, what do you hold
    Open      Opened      give me a KV cache of so many blocks, and the shared memory to talk through
    Step      Stepped     run the tokens that lie in shared memory through the sealed prefix
    Choose    Chosen      a sealed head: choose tokens for the states that lie there; with them logits, if allowed
    Score     Scored      a sealed head: logits of the states
    Backward  Gradients   a sealed head: from gradients of the logits, those of the states
    Reveal    Revealed    a shuffled head: what the words that lie there are in truth
    Unmix     Unmixed     kv: enclave: put attention of an open block, which lies there, in order
    Wipe      Wiped       overwrite KV blocks whose text has ended
    Status    StatusIs    how busy are you

A process that provides an enclave with its key sends `Provision` on the enclave's standard input, behind the
32 raw bytes of the sealing key, and gets `Ready` or `Failed` on its standard output; this happens once.
"""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from semiopen.bundle.lease import LONGEST_LEASE, Rights
from semiopen.errors import ProtocolError
from semiopen.model.plan import Head

MessageT = TypeVar("MessageT")
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 8, 1024  # tokens in a KV block
_MAX_COUNT = 2**31 - 1
MAX_WIPED = 4096  # KV blocks that one `Wipe` may name; their numbers fit a frame
_MAX_SHOWN = 80  # characters of a malformed field's name that a refusal repeats, as the sender chose them
Count = Annotated[int, Field(ge=0, le=_MAX_COUNT)]
Total = Annotated[int, Field(ge=0, le=2**63 - 1)]  # counts up for as long as an enclave runs
Positive = Annotated[int, Field(ge=1, le=_MAX_COUNT)]
DType = Literal["float32", "bfloat16", "float16"]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Hello(_Message):
    """First message of a client."""

    kind: Literal["hello"] = "hello"


class LeaseIs(_Message):
    """What limits this enclave by a lease: seconds since 1970, tokens in all, tokens per minute."""

    customer: str
    ends: Total
    tokens: Total | None
    rate: Total | None


class Welcome(_Message):
    """What this enclave is and holds. `enclave` says in words what protects it.

    `lease` is None where the bundle needs none and none was given. `windows` are the
    distinct attention windows of its blocks in rising order, 0 for blocks that see all tokens. `mixed_blocks` counts
    the open blocks whose attention it puts in order, `attention_size` the numbers of that.
    """

    kind: Literal["welcome"] = "welcome"
    enclave: str
    measures: list[str]
    bundle_digest: str
    prefix: Count
    head: Head
    rights: Rights
    lease: LeaseIs | None
    dtype: DType
    hidden_size: Positive
    vocab_size: Positive
    context: Positive
    windows: list[Count]
    max_kv_tokens: Positive
    max_step_tokens: Positive
    max_sequences: Positive
    max_rows: Positive
    max_logits: Positive
    mixed_blocks: Count = 0
    attention_size: Count = 0


class Open(_Message):
    """Ask for a session: a KV cache of `blocks` blocks and shared memory for steps up to the given sizes.

    With `by_window` each sequence brings a block table for each of the enclave's `windows`, and a table for a
    sliding window need not keep blocks that have left it; that is how engines with a paged cache do it. Without,
    one table serves all blocks. `rows`, `logit_rows` and `history` are for a sealed head: states and logits of one
    request, and earlier tokens of its rows in all. `attention_rows` are those of one `Unmix`.
    """

    kind: Literal["open"] = "open"
    blocks: Positive
    block_size: Annotated[int, Field(ge=MIN_BLOCK_SIZE, le=MAX_BLOCK_SIZE)]
    by_window: bool
    step_tokens: Positive
    sequences: Positive
    rows: Count = 0
    logit_rows: Count = 0
    history: Count = 0
    attention_rows: Count = 0


class Opened(_Message):
    """The session is there; the descriptor of its shared memory (`nbytes` long) comes with this frame."""

    kind: Literal["opened"] = "opened"
    nbytes: Total


class Step(_Message):
    """Run `tokens` tokens of `sequences` sequences, after copying `copies` KV blocks.

    `width` is the number of block-table columns in use. The arrays themselves are in shared memory.
    `score_cap` is false where the engine's own attention leaves out the family's cap on scores (Gemma 2 under
    transformers' SDPA), so that all blocks of a model agree.
    """

    kind: Literal["step"] = "step"
    tokens: Positive
    sequences: Positive
    width: Positive
    copies: Count
    score_cap: bool


class Stepped(_Message):
    """The hidden states of `tokens` tokens lie in shared memory; the prefix took `compute_us` microseconds."""

    kind: Literal["stepped"] = "stepped"
    tokens: Positive
    compute_us: Count


class Choose(_Message):
    """Choose the next token of each of `rows` rows, of which states, settings and history lie in shared memory.

    `order` is that of an engine's filters: vLLM applies min_p first, transformers last. With `logits`, what the lease
    allows of them is written as well.
    """

    kind: Literal["choose"] = "choose"
    rows: Positive
    order: Literal["vllm", "transformers"]
    logits: bool


class Chosen(_Message):
    """The tokens lie in shared memory, and the logits if they were asked for."""

    kind: Literal["chosen"] = "chosen"
    rows: Positive
    compute_us: Count


class Score(_Message):
    """Ask for the logits of `rows` states that lie in shared memory."""

    kind: Literal["score"] = "score"
    rows: Positive


class Scored(_Message):
    """The logits lie in shared memory; if only some are allowed, log-probabilities with minus infinity elsewhere."""

    kind: Literal["scored"] = "scored"
    rows: Positive


class Backward(_Message):
    """Ask for the gradients of `rows` states, of which those of their logits lie in shared memory beside the states."""

    kind: Literal["backward"] = "backward"
    rows: Positive


class Gradients(_Message):
    """The gradients lie in shared memory where the states were."""

    kind: Literal["gradients"] = "gradients"
    rows: Positive


class Reveal(_Message):
    """Ask what `count` shuffled words are, whose numbers lie in shared memory."""

    kind: Literal["reveal"] = "reveal"
    count: Positive


class Revealed(_Message):
    """Their true numbers lie there now."""

    kind: Literal["revealed"] = "revealed"
    count: Positive


class Unmix(_Message):
    """Ask for the attention of `rows` tokens of an open block, numbered from 0, to be put in order where it lies.

    With `back` the other way round, which is what gradients need.
    """

    kind: Literal["unmix"] = "unmix"
    block: Count
    rows: Positive
    back: bool = False


class Unmixed(_Message):
    """It is in order."""

    kind: Literal["unmixed"] = "unmixed"
    rows: Positive


class Wipe(_Message):
    """Ask for zeros in KV blocks of this session, which count as never written then."""

    kind: Literal["wipe"] = "wipe"
    blocks: Annotated[list[Count], Field(min_length=1, max_length=MAX_WIPED)]


class Wiped(_Message):
    """They hold zeros."""

    kind: Literal["wiped"] = "wiped"
    blocks: Positive


class Status(_Message):
    """Ask for counters. Needs no session."""

    kind: Literal["status"] = "status"


class StatusIs(_Message):
    """Counters since start; `kv_tokens` is the room in KV caches that open sessions have reserved.

    `used` is what the lease counts, earlier runs included; `left` what remains of it, None without a limit.
    """

    kind: Literal["status_is"] = "status_is"
    sessions: Count
    kv_tokens: Count
    steps: Total
    tokens: Total
    refused: Total
    used: Total
    left: Total | None


FailureCode = Literal[
    "frame",
    "message",
    "order",
    "limit",
    "shape",
    "token",
    "context",
    "block",
    "position",
    "lease",
    "start",
    "internal",
]


class Failed(_Message):
    """A refusal. `code` is for programs, `message` for people; neither carries data of any party."""

    kind: Literal["failed"] = "failed"
    code: FailureCode
    message: str


class Provision(_Message):
    """What an enclave is started with, beside the sealing key.

    `vendor_key` is a PEM public key; `lease` a JWT; `meter` the file in which its use is counted over restarts.
    """

    kind: Literal["provision"] = "provision"
    bundle: str
    vendor_key: str
    dtype: DType | None
    threads: Count
    max_kv_tokens: Positive
    lease: Annotated[str, Field(max_length=LONGEST_LEASE)] | None = None
    meter: str | None = None


class Ready(_Message):
    """The enclave has loaded its bundle and accepts clients."""

    kind: Literal["ready"] = "ready"


AnyRequest = Hello | Open | Step | Choose | Score | Backward | Reveal | Unmix | Wipe | Status
AnyReply = Welcome | Opened | Stepped | Chosen | Scored | Gradients | Revealed | Unmixed | Wiped | StatusIs | Failed

REQUEST: TypeAdapter[AnyRequest] = TypeAdapter(Annotated[AnyRequest, Field(discriminator="kind")])
REPLY: TypeAdapter[AnyReply] = TypeAdapter(Annotated[AnyReply, Field(discriminator="kind")])
START_REPLY: TypeAdapter[Ready | Failed] = TypeAdapter(Annotated[Ready | Failed, Field(discriminator="kind")])
PROVISION: TypeAdapter[Provision] = TypeAdapter(Provision)


def parse(adapter: TypeAdapter[MessageT], payload: bytes) -> MessageT:
    """Parse one untrusted payload into a typed message.

    Raises:
        ProtocolError: not JSON, not a known kind, or a field is missing, extra or out of range.
    """
    try:
        return adapter.validate_json(payload)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:_MAX_SHOWN] or "message"  # names are the sender's
        raise ProtocolError(f"The message is malformed at {where!r} ({first['type']}).") from None


def dump(message: BaseModel) -> bytes:
    """Serialise a message to the payload of a frame."""
    return message.model_dump_json().encode()
