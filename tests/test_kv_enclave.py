"""`kv: enclave`: values are cached in an order that only the enclave knows, and the model is the one it was."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, PreTrainedModel

import semiopen
from semiopen.enclave.attention_order import AttentionOrder
from semiopen.errors import BundleError, UnsupportedCallError
from semiopen.host.enclave_process import EnclaveProcess
from semiopen.host.serving.engine import Sampling
from semiopen.host.serving.transformers_engine import TransformersEngine
from semiopen.host.unmixing import Unmixer
from semiopen.model.families import FAMILIES as SEALED
from semiopen.model.families import attention_size
from semiopen.model.kv_symmetries import KvFold
from semiopen.model.sealed_tensors import UNMIX_NAME
from semiopen.protocol.channel import Layout, SharedArrays
from semiopen.protocol.messages import Failed, Hello, Open, Opened, Unmix, Unmixed, Welcome
from tests.adversary.lying_host import LyingHost, code_of
from tests.conftest import EnclaveThreads
from tests.models import FAMILIES, VOCAB, random_model, save_random_model
from tests.test_seal import open_tensors, sealed_tensors
from tests.vendor.test_fold import error, logits, model_of, originals

SECRET = bytes(range(32))
PREFIX, BLOCKS, SIZE, ROWS = 1, 3, 32, 5  # of the llama of these tests; ROWS are those of a hostile session


@pytest.fixture(scope="module")
def made(tmp_path_factory, keys, enclave_threads: EnclaveThreads) -> Callable[[str], tuple[PreTrainedModel, Path, Any]]:
    """family -> (original, bundle, its enclave), made once."""
    done: dict[str, Any] = {}

    def make(family: str) -> tuple[PreTrainedModel, Path, Any]:
        if family not in done:
            folder = tmp_path_factory.mktemp(family)
            original = save_random_model(family, folder / "model")
            semiopen.seal(folder / "model", folder / "bundle", keys, prefix=PREFIX, kv="enclave")
            done[family] = original, folder / "bundle", enclave_threads.start(folder / "bundle", keys)
        return done[family]

    return make


@pytest.fixture(scope="module")
def llama(made):
    """The llama's bundle, opened."""
    original, bundle, enclave = made("llama")
    model = semiopen.load(bundle, enclave=enclave.path, kv_tokens=4096)
    yield original, model, enclave
    model.enclave.close()


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    return ids, mask


def cached(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompts()[0][1:], past_key_values=cache, use_cache=True)
    return cache


class Local:
    """Puts attention in order as the enclave would, here, in any dtype."""

    def __init__(self, fold: KvFold, blocks: int) -> None:
        self.order = [torch.from_numpy(fold.unmix(block)) for block in range(blocks)]

    def unmix(self, block: int, attention: torch.Tensor, back: bool = False) -> torch.Tensor:
        order = self.order[block].argsort() if back else self.order[block]
        return attention[:, order]


# --- The same model ---


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_in_every_family(family):
    original = originals(family)
    fold = KvFold(original.config, SECRET, unmixed_from=0)
    tensors = {name: fold.apply(name, tensor) for name, tensor in original.state_dict().items()}
    mixed = model_of(original.config, tensors, torch.float64)
    assert error(logits(original), logits(mixed)) > 1e-3, "control: nobody has put it in order yet"
    blocks = getattr(mixed.base_model, SEALED[original.config.model_type].layers)
    unmixer = Unmixer(None, blocks)  # type: ignore[arg-type]
    unmixer.client = Local(fold, 4)  # type: ignore[assignment]
    assert error(logits(original), logits(mixed)) < 1e-9
    # The next block's order is another one.
    unmixer.client.order = unmixer.client.order[1:] + unmixer.client.order[:1]  # type: ignore[union-attr]
    assert error(logits(original), logits(mixed)) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3-window", "gpt-neox", "qwen3-moe", "gemma3"])
def test_tokens_and_caches(family, made):
    """Greedy tokens with padding, one by one; the cache holds each token's values, in no order that the model has."""
    original, bundle, enclave = made(family)
    model = semiopen.load(bundle, enclave=enclave.path, kv_tokens=4096)
    try:
        ids, mask = prompts()
        expected, got = (
            m.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False) for m in (original, model)
        )
        assert torch.equal(expected, got)
        ours, theirs = cached(model), cached(original)
        for block in range(BLOCKS):
            mixed, plain = ours.layers[block], theirs.layers[block + PREFIX]
            values = [layer.values[0].transpose(0, 1).flatten(1) for layer in (mixed, plain)]  # [T, heads * size]
            torch.testing.assert_close(*(value.sort(dim=1).values for value in values), atol=1e-4, rtol=1e-4)
            assert float((values[0] - values[1]).norm() / values[1].norm()) > 0.3
            assert not torch.allclose(mixed.keys.sort().values, plain.keys.sort().values, atol=1e-2)
    finally:
        model.enclave.close()


def test_what_is_in_the_bundle(made, keys):
    """The output projection as it was, values in another order, and that order among what is sealed alone."""
    original, bundle, _ = made("llama")
    state, opened, sealed = original.state_dict(), open_tensors(bundle), sealed_tensors(bundle, keys)
    places = sealed[UNMIX_NAME]
    assert places.shape == (BLOCKS, SIZE)
    assert UNMIX_NAME not in opened
    for block in range(BLOCKS):
        ours, theirs = (f"model.layers.{number}.self_attn." for number in (block, block + PREFIX))
        assert torch.equal(opened[f"{ours}o_proj.weight"], state[f"{theirs}o_proj.weight"])
        mixed, plain = opened[f"{ours}v_proj.weight"], state[f"{theirs}v_proj.weight"]
        assert not torch.equal(mixed, plain)
        assert torch.equal(mixed.sort(dim=0).values, plain.sort(dim=0).values)
        # Groups of two query heads share the rows of a value head.
        grouped = [rows.reshape(2, 1, 8, -1).expand(2, 2, 8, -1).reshape(SIZE, -1) for rows in (mixed, plain)]
        assert torch.equal(grouped[0][places[block].long()], grouped[1])


def test_another_order_for_each_bundle(made, keys, tmp_path):
    _, bundle, _ = made("llama")
    semiopen.seal(bundle.parent / "model", tmp_path / "again", keys, prefix=PREFIX, kv="enclave")
    first, second = (sealed_tensors(folder, keys)[UNMIX_NAME] for folder in (bundle, tmp_path / "again"))
    assert len({tuple(order.tolist()) for order in (*first, *second)}) == 2 * BLOCKS


def test_one_crossing_a_block_and_forward(llama, monkeypatch):
    _, model, _ = llama
    client, asked = model.enclave.session.client, []
    exchange = client._exchange
    monkeypatch.setattr(client, "_exchange", lambda request, kind: (asked.append(request), exchange(request, kind))[1])
    ids, mask = prompts()
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None)
    crossings = [(request.block, request.rows) for request in asked if isinstance(request, Unmix)]
    assert crossings == [(block, rows) for rows in (18, 2, 2) for block in range(BLOCKS)]


def test_more_rows_than_the_session_has(llama, monkeypatch):
    _, model, _ = llama
    client = model.enclave.session.client
    attention = torch.randn(7, SIZE)
    whole = client.unmix(1, attention)
    monkeypatch.setattr(client, "layout", Layout(**{**vars(client.layout), "attention_rows": 3}))
    assert torch.equal(client.unmix(1, attention), whole)
    assert torch.equal(client.unmix(1, whole, back=True), attention)
    assert not torch.equal(whole, attention)


def test_the_preset(tmp_path, keys):
    save_random_model("llama", tmp_path / "model")
    plan = semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys, preset="kv-shield").plan
    assert (plan.prefix, plan.head, plan.fold, plan.kv) == (0, "open", "none", "enclave")
    assert sealed_tensors(tmp_path / "bundle", keys)[UNMIX_NAME].shape == (4, SIZE)


# --- Adapters ---


def test_an_adapter_is_trained_through_the_enclave_and_merged(made):
    """What is merged into the output projection must have been trained on what that reads."""
    _, bundle, enclave = made("llama")
    model = semiopen.load(bundle, enclave=enclave.path, kv_tokens=4096)
    plain = model(prompts()[0]).logits.detach()
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["o_proj", "v_proj"], task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    ids = prompts()[0]
    optimiser = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2, losses
    beside = tuned(input_ids=ids).logits.detach()
    merged = tuned.merge_and_unload()
    within = merged(ids).logits.detach()
    merged.enclave.close()
    assert error(plain, beside) > 0.01
    assert error(beside, within) < 1e-4


def test_gradients_are_those_of_the_same_order_here(llama):
    _, model, _ = llama
    attention = torch.randn(2, 3, SIZE, requires_grad=True)
    above = torch.randn(2, 3, SIZE)
    result = model.unmixer.unmix(attention, 2)
    result.backward(above)
    client = model.enclave.session.client
    places = client.unmix(2, torch.arange(SIZE, dtype=torch.float32)[None])[0].long()
    again = attention.detach().clone().requires_grad_(True)
    expected = again[..., places]
    expected.backward(above)
    assert torch.equal(result, expected)
    assert torch.equal(attention.grad, again.grad)
    assert not torch.equal(attention.grad, above)


# --- Refusals ---


def test_a_fresh_basis_of_the_keys_is_refused(made):
    _, bundle, enclave = made("llama")
    with pytest.raises(UnsupportedCallError, match="several views"):
        semiopen.load(bundle, enclave=enclave.path, rekey_kv=True)


def test_our_engine_serves_it(made, keys):
    _, bundle, enclave = made("llama")
    prompts = [list(range(3, 40)), [7, 8, 9], list(range(3, 40))]  # one shares its beginning

    async def texts(engine: TransformersEngine) -> list[list[int]]:
        try:
            found = []
            for prompt in prompts:
                pieces = [piece async for piece in engine.generate("one", prompt, Sampling(8, 0.0, ignore_eos=True))]
                found.append([token for piece in pieces for token in piece.token_ids])
            return found
        finally:
            await engine.close()

    protected = TransformersEngine.open(bundle, enclave=enclave.path, vendor_key=keys / "vendor.pub", kv_tokens=1024)
    assert asyncio.run(texts(protected)) == asyncio.run(
        texts(TransformersEngine.open_plain(bundle.parent / "model", kv_tokens=1024))
    )


def test_nothing_open_nothing_to_mix(tmp_path, keys):
    save_random_model("llama", tmp_path / "model")
    with pytest.raises(ValueError, match="no cache is outside"):
        semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys, prefix=4, kv="enclave")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    "table",
    [
        torch.arange(8).repeat(2, 1),
        torch.arange(8).repeat(3, 1).flip(0)[:, :7],
        torch.zeros(3, 8, dtype=torch.int32),
        torch.arange(8).repeat(3, 1) - 1,
        torch.arange(8).repeat(3, 1) + 1,
        torch.empty(0, 0, dtype=torch.int32),
    ],
    ids=["blocks", "size", "repeated", "negative", "beyond", "none"],
)
def test_a_damaged_order_is_refused(table):
    with pytest.raises(BundleError, match="damaged"):
        AttentionOrder(table, 3, 8)


# --- Hosts that lie ---


class MixedHost(LyingHost):
    """A lying host with a session that has room for attention."""

    def begin(self, rows: int = ROWS) -> "MixedHost":
        welcome = self.ask(Hello())
        assert isinstance(welcome, Welcome)
        opened = self.ask(open_request(rows))
        assert isinstance(opened, Opened), opened
        layout = Layout(
            step_tokens=4,
            sequences=2,
            block_size=16,
            by_window=False,
            windows=len(welcome.windows),
            context=welcome.context,
            hidden_size=welcome.hidden_size,
            dtype=torch.float32,
            vocab_size=welcome.vocab_size,
            attention_rows=rows,
            attention_size=welcome.attention_size,
        )
        assert opened.nbytes == layout.nbytes()
        self.arrays = SharedArrays(self.descriptors[0], layout)
        return self

    @property
    def attention(self) -> torch.Tensor:
        assert self.arrays is not None
        return self.arrays.attention


def open_request(rows: int) -> Open:
    return Open(blocks=2, block_size=16, by_window=False, step_tokens=4, sequences=2, attention_rows=rows)


def still_right(enclave, order: torch.Tensor) -> None:
    with MixedHost(enclave.path) as host:
        host.begin().attention[0] = torch.arange(SIZE)
        assert host.ask(Unmix(block=0, rows=1)) == Unmixed(rows=1)
        assert torch.equal(host.attention[0], order)


@pytest.fixture(scope="module")
def first_order(llama, keys, made) -> torch.Tensor:
    """What the first open block's numbers 0, 1, ... become."""
    return sealed_tensors(made("llama")[1], keys)[UNMIX_NAME][0].float()


@pytest.mark.parametrize(
    ("code", "request_"),
    [
        ("shape", {"block": BLOCKS, "rows": 1}),
        ("shape", {"block": 2**31 - 1, "rows": 1}),
        ("shape", {"block": 0, "rows": ROWS + 1}),
        ("shape", {"block": 0, "rows": 2**31 - 1}),
        ("message", {"block": -1, "rows": 1}),
        ("message", {"block": 0, "rows": 0}),
        ("message", {"block": 0, "rows": -1}),
        ("message", {"block": 2**31, "rows": 1}),
        ("message", {"block": 0.0, "rows": 1}),
        ("message", {"block": True, "rows": 1}),
        ("message", {"block": 0, "rows": 1, "back": 1}),
        ("message", {"block": 0, "rows": 1, "width": 4}),
        ("message", {"rows": 1}),
    ],
    ids=str,
)
def test_hostile_requests(llama, first_order, code, request_):
    enclave = llama[2]
    with MixedHost(enclave.path) as host:
        host.begin().attention[:] = torch.randn(ROWS, SIZE)
        before = host.attention.clone()
        assert code_of(host.ask({"kind": "unmix", **request_})) == code
        assert torch.equal(host.attention, before)
        assert host.ask(Unmix(block=BLOCKS - 1, rows=ROWS)) == Unmixed(rows=ROWS)
        assert not torch.equal(host.attention, before), "control: the last of both is answered"
    still_right(enclave, first_order)


def test_order_of_requests_and_sizes(llama, first_order):
    enclave = llama[2]
    with MixedHost(enclave.path) as host:
        assert code_of(host.ask(Unmix(block=0, rows=1))) == "order"
        assert code_of(host.ask(open_request(8193))) == "limit"
        assert code_of(host.ask(open_request(2**31 - 1))) == "limit"
        host.begin(rows=0)
        assert code_of(host.ask(Unmix(block=0, rows=1))) == "shape"
    still_right(enclave, first_order)


def test_a_bundle_without_it_has_no_room_for_it(made, keys, tmp_path, enclave_threads):
    _, bundle, _ = made("llama")
    semiopen.seal(bundle.parent / "model", tmp_path / "plain", keys, prefix=PREFIX, kv="folded")
    path = enclave_threads.start(tmp_path / "plain", keys).path
    with LyingHost(path) as host:
        welcome = host.ask(Hello())
        assert isinstance(welcome, Welcome)
        assert (welcome.mixed_blocks, welcome.attention_size) == (0, 0)
        refused = host.ask(open_request(1))
        assert code_of(refused) == "limit"
        assert isinstance(refused, Failed)
        assert "No attention" in refused.message
        host.open()
        assert code_of(host.ask(Unmix(block=0, rows=1))) == "order"


def test_what_lies_there_is_moved_whatever_it_is(llama, first_order):
    """No number is looked at: those that are not finite, and each of a NaN's bits, come to their place."""
    enclave = llama[2]
    bits = torch.randint(-(2**31), 2**31 - 1, (SIZE,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    bits[:4] = torch.tensor([0x7FC12345, -0x400000, 0x7F800000, 0x7F800001])  # NaN, NaN, infinity, signalling NaN
    with MixedHost(enclave.path) as host:
        host.begin().attention[0].view(torch.int32).copy_(bits)
        host.attention[1] = float("nan")
        host.attention[2] = torch.arange(SIZE)
        assert host.ask(Unmix(block=0, rows=3)) == Unmixed(rows=3)
        assert torch.equal(host.attention[0].view(torch.int32), bits[first_order.long()])
        assert bool(host.attention[1].isnan().all())
        assert torch.equal(host.attention[2], first_order), "no row reaches another"
    still_right(enclave, first_order)


def test_memory_that_changes_meanwhile(llama, first_order, monkeypatch):
    enclave = llama[2]
    put = AttentionOrder.put
    with MixedHost(enclave.path) as host:
        host.begin().attention[:] = 1.0

        def rewrite(self, rows, block, back):
            host.attention[:] = float("inf")
            put(self, rows, block, back)

        monkeypatch.setattr(AttentionOrder, "put", rewrite)
        assert host.ask(Unmix(block=0, rows=1)) == Unmixed(rows=1)
        monkeypatch.undo()
    still_right(enclave, first_order)


def test_an_error_inside_tells_nothing(llama, first_order, monkeypatch):
    def fail(self, rows, block, back):
        raise RuntimeError("the-order-4711")

    enclave = llama[2]
    with MixedHost(enclave.path) as host:
        host.begin()
        monkeypatch.setattr(AttentionOrder, "put", fail)
        reply = host.ask(Unmix(block=0, rows=1))
        monkeypatch.undo()
        assert isinstance(reply, Failed)
        assert (reply.code, "4711" in reply.message) == ("internal", False)
    still_right(enclave, first_order)


def test_it_is_not_counted(llama):
    enclave = llama[2]
    used = enclave.server.used
    with MixedHost(enclave.path) as host:
        host.begin()
        for _ in range(20):
            assert host.ask(Unmix(block=1, rows=ROWS)) == Unmixed(rows=ROWS)
    assert enclave.server.used == used


def test_the_order_is_free_to_ask_for(llama, keys, made):
    """The limit that the documentation tells: who may ask reads the order off one row."""
    places = sealed_tensors(made("llama")[1], keys)[UNMIX_NAME]
    with MixedHost(llama[2].path) as host:
        host.begin()
        for block in range(BLOCKS):
            host.attention[0] = torch.arange(SIZE)
            host.ask(Unmix(block=block, rows=1))
            assert torch.equal(host.attention[0].int(), places[block])


def test_the_hardened_process(made, keys, first_order):
    """What torch loads on first use must be there when no file opens any more."""
    original, bundle, _ = made("llama")
    process = EnclaveProcess(bundle, keys, "float32", 1)
    try:
        process.wait_ready()
        still_right(type("Running", (), {"path": process.socket_path}), first_order)
        model = semiopen.load(bundle, enclave=process.socket_path)
        ids, mask = prompts()
        with torch.no_grad():
            expected, got = (
                m.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False) for m in (original, model)
            )
        attention = torch.randn(600, SIZE)
        client = model.enclave.session.client
        assert torch.equal(client.unmix(0, client.unmix(0, attention), back=True), attention)
        model.enclave.close()
    finally:
        process.close()
    assert torch.equal(expected, got)


def test_attention_sizes():
    """The enclave's idea of how wide attention is, against the modules' own."""
    for family, config in FAMILIES.items():
        model = random_model(config)
        for name, tensor in model.state_dict().items():
            if name.endswith(("o_proj.weight", "attention.dense.weight")):
                assert tensor.shape[1] == attention_size(config), family
            if name.endswith("attn.c_proj.weight"):
                assert tensor.shape[0] == attention_size(config), family
