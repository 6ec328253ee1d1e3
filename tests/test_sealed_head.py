"""A head in the enclave, or with its words shuffled: the original's tokens, and no more than the lease gives."""

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    WatermarkingConfig,
)

import semiopen
from semiopen.audit.plaintext import sample_pieces, search
from semiopen.bundle.keys import load_vendor_key
from semiopen.bundle.lease import Rights
from semiopen.bundle.manifest import parse_manifest
from semiopen.errors import EnclaveError, LeaseError, UnsupportedCallError
from semiopen.host import sealed_generation
from semiopen.host.client import RowChoice
from semiopen.host.modeling import session_of
from semiopen.vendor.lease import new_lease
from tests.conftest import EnclaveThreads, InProcessEnclave
from tests.models import FAMILIES, VOCAB, save_random_model

CHOOSE = Rights()
FULL = Rights(logits="full")
TOP = Rights(logits="top-k", top_k=5)
TUNE = Rights(tune=True)
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


class Sealer:
    """Models, their bundles and enclaves; each made once."""

    def __init__(self, folder: Path, keys: Path, threads: EnclaveThreads) -> None:
        self._folder, self.keys, self._threads = folder, keys, threads
        self._opened: list[PreTrainedModel] = []
        self._made: dict[tuple, Any] = {}

    def original(self, family: str) -> PreTrainedModel:
        """A random model."""
        config = copy.deepcopy(FAMILIES[family])
        if family == "gemma2":
            config.final_logit_softcapping = 1.0  # by default so high that tiny models do not feel it
        folder = self._folder / family / "model"
        return self._once(("model", family), lambda: save_random_model(family, folder, config=config))

    def bundle(self, family: str, head: str = "sealed", prefix: int = 1) -> Path:
        """Its bundle, beside the folder `model`."""
        self.original(family)
        bundle = self._folder / family / f"{head}-{prefix}"
        model = bundle.parent / "model"
        self._once((family, head, prefix), lambda: semiopen.seal(model, bundle, self.keys, prefix=prefix, head=head))  # type: ignore[arg-type]
        return bundle

    def protected(self, family: str, head: str = "sealed", rights: Rights = CHOOSE, prefix: int = 1) -> PreTrainedModel:
        """The bundle's model, under a lease without limits."""
        return self._once((family, head, rights, prefix), lambda: self.open(family, head, rights, prefix)[0])

    def _once(self, what: tuple, make: Callable[[], Any]) -> Any:
        if what not in self._made:
            self._made[what] = make()
        return self._made[what]

    def open(
        self, family: str, head: str = "sealed", rights: Rights = CHOOSE, prefix: int = 1, **lease: Any
    ) -> tuple[PreTrainedModel, InProcessEnclave]:
        """A model, and the enclave that it talks to alone."""
        bundle = self.bundle(family, head, prefix)
        enclave = self._threads.start(bundle, self.keys, lease=new_lease(bundle, self.keys, "acme", rights, **lease))
        self._opened.append(semiopen.load(bundle, enclave=enclave.path))
        return self._opened[-1], enclave

    def close(self) -> None:
        for model in self._opened:
            model.enclave.close()


@pytest.fixture(scope="module")
def sealer(tmp_path_factory: pytest.TempPathFactory, keys: Path, enclave_threads: EnclaveThreads) -> Iterator[Sealer]:
    sealer = Sealer(tmp_path_factory.mktemp("heads"), keys, enclave_threads)
    yield sealer
    sealer.close()


def prompts(rows: int, length: int, padding: bool = False) -> dict[str, torch.Tensor]:
    """Random prompts; with `padding` each is two tokens shorter than the one before, filled on the left."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    for row in range(rows if padding else 0):
        ids[row, : 2 * row], mask[row, : 2 * row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def same(left: PreTrainedModel, right: PreTrainedModel, inputs: dict[str, torch.Tensor], **how: Any) -> torch.Tensor:
    """Tokens of both, which must be equal."""
    mine, theirs = (model.generate(**inputs, **{**GREEDY, **how}) for model in (left, right))  # type: ignore[operator]
    assert torch.equal(mine, theirs)
    assert mine.shape[1] > inputs["input_ids"].shape[1]
    return mine


# --- The same tokens ---


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_originals(sealer, family):
    original, protected = sealer.original(family), sealer.protected(family)
    plain = same(original, protected, prompts(3, 9, padding=True))
    assert len(set(plain[0, 9:].tolist())) > 2, "a model that repeats itself shows little"
    penalised = same(original, protected, prompts(3, 9, padding=True), repetition_penalty=1.7)
    assert not torch.equal(plain, penalised)
    same(original, protected, prompts(1, 150), max_new_tokens=4)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2"])
def test_greedy_tokens_with_shuffled_words(sealer, family):
    original, protected = sealer.original(family), sealer.protected(family, "shuffled")
    same(original, protected, prompts(3, 9, padding=True))
    same(original, protected, prompts(1, 150), max_new_tokens=4)


@pytest.mark.parametrize(("family", "prefix"), [("llama-tied", 0), ("llama", 0), ("llama", 4), ("gemma2", 4)])
def test_nothing_and_everything_in_the_prefix(sealer, family, prefix):
    same(sealer.original(family), sealer.protected(family, prefix=prefix), prompts(2, 9, padding=True))


@pytest.mark.parametrize("head", ["sealed", "shuffled"])
def test_a_conversation_goes_on_from_its_cache(sealer, head):
    texts = []
    for model in (sealer.original("llama"), sealer.protected("llama", head)):
        first = model.generate(**prompts(1, 9), **GREEDY, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, prompts(1, 5)["input_ids"]], dim=1)
        texts.append(model.generate(longer, past_key_values=first.past_key_values, **GREEDY))
    assert torch.equal(*texts)


def test_ends_streams_and_configs_work_as_ever(sealer):
    original, protected = sealer.original("llama"), sealer.protected("llama")
    inputs = prompts(2, 9)
    tokens = same(original, protected, inputs)
    stop = int(tokens[0, 14])
    same(original, protected, inputs, eos_token_id=stop)
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=stop, pad_token_id=0)
    both = [model.generate(**inputs, generation_config=config) for model in (original, protected)]
    assert torch.equal(*both)
    assert (config.do_sample, config.max_new_tokens, config.top_k) == (False, 5, GenerationConfig().top_k)

    class Streamer:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.reshape(-1).tolist()

        def end(self) -> None:
            self.seen.append(-1)

    streamer = Streamer()
    one = protected.generate(**prompts(1, 9), **GREEDY, streamer=streamer)
    assert streamer.seen == [*one[0].tolist(), -1]
    uncached = protected.generate(**prompts(1, 9), **GREEDY, use_cache=False)
    assert torch.equal(uncached, one)


def test_what_a_model_draws_is_not_the_next_ones(sealer):
    """One generate at a time: its settings are not another's."""
    protected = sealer.protected("llama")
    protected.enclave_head.generating = object()
    with pytest.raises(UnsupportedCallError, match="one generate at a time"):
        protected.generate(**prompts(1, 5), **GREEDY)
    protected.enclave_head.generating = None
    same(sealer.original("llama"), protected, prompts(1, 5))


# --- Logits ---


@pytest.mark.parametrize(
    ("family", "head"),
    [("llama", "sealed"), ("gemma2", "sealed"), ("gpt-neox", "sealed"), ("llama", "shuffled"), ("gemma2", "shuffled")],
)
def test_logits_in_full_are_the_originals(sealer, family, head):
    original, protected = sealer.original(family), sealer.protected(family, head, FULL)
    inputs = prompts(3, 9, padding=True)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, found = (model(**inputs).logits for model in (original, protected))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)
    same(original, protected, inputs, num_beams=3)
    same(original, protected, inputs, no_repeat_ngram_size=2)


def test_only_the_likeliest_log_probabilities(sealer):
    original, protected = sealer.original("llama"), sealer.protected("llama", rights=TOP)
    inputs = prompts(2, 9)
    with torch.no_grad():
        expected = original(**inputs).logits.log_softmax(-1)
        found = protected(**inputs).logits
    best = expected.topk(5, dim=-1)
    assert torch.equal(found.isfinite().sum(-1), torch.full((2, 9), 5))
    torch.testing.assert_close(found.gather(-1, best.indices), best.values, atol=1e-4, rtol=1e-4)
    tokens, kept = session_of(protected).client.choose(
        torch.randn(7, 32), [RowChoice()] * 7, "transformers", logits=True
    )
    assert kept is not None
    assert torch.equal(kept.isfinite().sum(-1), torch.full((7,), 5))
    assert torch.equal(kept.argmax(-1), torch.from_numpy(tokens))


@pytest.mark.parametrize("head", ["sealed", "shuffled"])
def test_no_logits_without_the_right(sealer, head):
    protected = sealer.protected("llama", head)
    with pytest.raises(EnclaveError, match="ask the vendor for a lease with") as caught:
        protected(**prompts(1, 5))
    assert caught.value.code == "lease"
    client = session_of(protected).client
    requests: list[Callable[[], object]] = []
    if head == "sealed":
        requests = [
            lambda: client.score(torch.randn(1, 32)),
            lambda: client.choose(torch.randn(1, 32), [RowChoice()], "vllm", logits=True),
            lambda: client.backward(torch.randn(1, 32), torch.randn(1, VOCAB)),
        ]
    for request in requests:
        with pytest.raises(EnclaveError, match="does not allow") as caught:
            request()
        assert caught.value.code == "lease"


def test_words_are_revealed_one_by_one_and_each_counts(sealer):
    """So a shuffled head costs as many tokens to unshuffle as it has words: what a lease of so many gives away."""
    protected, enclave = sealer.open("llama", "shuffled", tokens=VOCAB)
    truth = torch.from_numpy(session_of(protected).client.reveal(np.arange(VOCAB)))
    weight = protected.get_output_embeddings().weight
    assert torch.equal(weight, sealer.original("llama").get_output_embeddings().weight[truth])
    assert enclave.server.used == (0, VOCAB)
    with pytest.raises(EnclaveError, match=f"0 of {VOCAB} tokens left"):
        session_of(protected).client.reveal(np.arange(1))
    sealer.protected("llama", "shuffled", FULL).enclave_head.order  # noqa: B018 - with the right, it is given


def test_no_tokens_without_the_right(sealer):
    rights = Rights(generate=False, logits="top-k", top_k=3)
    protected = sealer.protected("llama", rights=rights)
    protected(**prompts(1, 5))  # the control
    with pytest.raises(EnclaveError, match="does not allow choosing tokens"):
        protected.generate(**prompts(1, 5), **GREEDY)
    shuffled = sealer.protected("llama", "shuffled", rights)
    with pytest.raises(EnclaveError, match="does not allow choosing tokens"):
        shuffled.generate(**prompts(1, 5), **GREEDY)


# --- Drawing ---


SETTINGS = {"temperature": 0.25, "top_k": 40, "top_p": 0.8, "min_p": 0.08, "repetition_penalty": 1.5}


def allowed(logits: torch.Tensor, seen: torch.Tensor, order: list[str], **settings: float) -> torch.Tensor:
    """Probabilities [V] that transformers' own processors leave, in an order."""
    makers = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    chain = LogitsProcessorList([makers[name](settings[name]) for name in order if name in settings])
    return chain(seen, logits[None].clone()).softmax(-1)[0]


def chance(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Of counts that differ as much from what these probabilities expect (chi-square)."""
    if counts[probabilities == 0].any():
        return 0.0
    expected = probabilities.double() * counts.sum()
    rare = expected < 5  # counted as one, as the test asks
    groups = [*zip(counts[~rare].tolist(), expected[~rare].tolist(), strict=True)]
    groups.append((float(counts[rare].sum()), float(expected[rare].sum())))
    groups = [(count, mean) for count, mean in groups if mean > 0]
    distance = sum((count - mean) ** 2 / mean for count, mean in groups)
    return float(torch.special.gammaincc(torch.tensor((len(groups) - 1) / 2), torch.tensor(distance / 2)))


ORDER = ["repetition_penalty", "temperature", "top_k", "top_p", "min_p"]


@pytest.mark.parametrize(("family", "head"), [("llama", "sealed"), ("gemma2", "sealed"), ("gemma2", "shuffled")])
def test_tokens_are_drawn_as_transformers_draws(sealer, family, head):
    """4,000 draws; the controls are the same draws judged by other settings, and by another order."""
    original, protected = sealer.original(family), sealer.protected(family, head)
    settings = {name: value for name, value in SETTINGS.items() if head == "sealed" or name != "repetition_penalty"}
    inputs = prompts(1, 6)
    torch.manual_seed(5)
    drawn = torch.cat(
        [
            protected.generate(**inputs, **settings, do_sample=True, max_new_tokens=1, num_return_sequences=1000)[:, -1]
            for _ in range(4)
        ]
    )
    counts = torch.bincount(drawn, minlength=VOCAB)
    with torch.no_grad():
        logits = original(**inputs).logits[0, -1]
    seen = inputs["input_ids"]
    right = allowed(logits, seen, ORDER, **settings)
    assert 8 < int((right > 0).sum()) < 60
    assert chance(counts, right) > 1e-4
    for wrong in (
        {**settings, "temperature": 0.3},
        {**settings, "top_p": 0.7},
        {**settings, "top_k": int((right > 0).sum()) - 2},
        {**settings, "min_p": 0.6},
    ):
        assert chance(counts, allowed(logits, seen, ORDER, **wrong)) < 1e-6, wrong
    other_order = ["repetition_penalty", "top_p", "top_k", "min_p", "temperature"]
    assert chance(counts, allowed(logits, seen, other_order, **settings)) < 1e-6


def test_vllms_order_and_penalties(sealer):
    """min_p comes first there, and presence and frequency count the answer's tokens alone."""
    original, protected = sealer.original("llama"), sealer.protected("llama")
    with torch.no_grad():
        states = original(**prompts(1, 6), output_hidden_states=True)
        below = original.model.layers[-1]
        captured: list[torch.Tensor] = []
        hook = below.register_forward_hook(lambda module, args, out: captured.append(out))
        original(**prompts(1, 6))
        hook.remove()
    state, logits = captured[0][0, -1], states.logits[0, -1].clone()
    likeliest = logits.topk(3).indices.tolist()
    row = RowChoice(
        temperature=0.25,
        min_p=0.08,
        top_p=0.8,
        presence=0.3,
        frequency=0.1,
        prompt=likeliest[2:],
        answer=[likeliest[0], likeliest[0], likeliest[1]],
    )
    rows = [RowChoice(**{**vars(row), "seed": 2**63 + seed}) for seed in range(4000)]
    tokens, _ = session_of(protected).client.choose(state.expand(4000, -1), rows, "vllm")
    counts = torch.bincount(torch.from_numpy(tokens), minlength=VOCAB)

    def judge(presence: float, frequency: float, order: list[str]) -> float:
        penalised = logits.clone()
        penalised[likeliest[0]] -= presence + 2 * frequency
        penalised[likeliest[1]] -= presence + frequency
        seen = torch.tensor([[0]])
        return chance(counts, allowed(penalised, seen, order, temperature=0.25, min_p=0.08, top_p=0.8))

    assert judge(0.3, 0.1, ["temperature", "min_p", "top_p"]) > 1e-4
    assert judge(0.3, 0.1, ["temperature", "top_p", "min_p"]) < 1e-6
    assert judge(0.3, 0.0, ["temperature", "min_p", "top_p"]) < 1e-6
    assert judge(0.0, 0.1, ["temperature", "min_p", "top_p"]) < 1e-6


@pytest.mark.parametrize("head", ["sealed", "shuffled"])
def test_a_seed_repeats_a_text(sealer, head):
    protected = sealer.protected("llama", head)

    def text(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return protected.generate(**prompts(1, 5), do_sample=True, max_new_tokens=12, num_return_sequences=2)

    assert torch.equal(text(3), text(3))
    assert not torch.equal(text(3), text(4))
    assert not torch.equal(text(3)[0], text(3)[1])


def test_who_knows_the_seed_does_not_know_the_draw(sealer):
    """Two bundles draw differently with one seed: the number comes from a secret as well."""
    state = torch.randn(1, 32)
    rows = [RowChoice(temperature=1e6, seed=seed) for seed in range(50)]
    texts = [
        session_of(sealer.protected("llama", prefix=prefix)).client.choose(state.expand(50, -1), rows, "vllm")[0]
        for prefix in (1, 4, 1)
    ]
    assert (texts[0] == texts[2]).all()
    assert (texts[0] == texts[1]).sum() < 10


# --- What needs logits is refused by its name ---


NOT_NEUTRAL: dict[str, Any] = {
    "num_beams": 2,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "typical_p": 0.9,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "top_h": 0.5,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.2,
    "bad_words_ids": [[5]],
    "min_length": 20,
    "min_new_tokens": 5,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "suppress_tokens": [5],
    "begin_suppress_tokens": [5],
    "sequence_bias": [[[5], 1.0]],
    "exponential_decay_length_penalty": (5, 1.2),
    "guidance_scale": 1.5,
    "watermarking_config": WatermarkingConfig(),
    "output_scores": True,
    "output_logits": True,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "prefill_chunk_size": 4,
    "remove_invalid_values": True,
    "token_healing": True,
    "use_mtp": True,
    "logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)]),
    "prefix_allowed_tokens_fn": lambda row, ids: [5],
    "negative_prompt_ids": torch.tensor([[5]]),
}


@pytest.mark.parametrize("name", [*sealed_generation._NEEDS_LOGITS, *sealed_generation._ARGUMENTS])
def test_a_setting_that_needs_logits_is_refused(sealer, name):
    original, protected = sealer.original("llama"), sealer.protected("llama")
    value = {**NOT_NEUTRAL, "assistant_model": original, "custom_generate": "user/repository"}[name]
    with pytest.raises(UnsupportedCallError, match=f"^{name} needs logits, which the lease does not allow; leave it"):
        protected.generate(**prompts(1, 5), **{**GREEDY, name: value})
    if name in sealed_generation._NEEDS_LOGITS:
        config = GenerationConfig(max_new_tokens=3)
        setattr(config, name, value)
        with pytest.raises(UnsupportedCallError, match=f"^{name} needs logits"):
            protected.generate(**prompts(1, 5), generation_config=config)


def test_every_setting_of_transformers_logits_is_known():
    """A setting that a later release adds must be refused or done, not passed over."""
    done = {"repetition_penalty", "temperature", "top_k", "top_p", "min_p", "do_sample", "use_cache", "num_beams"}
    no_matter = {"renormalize_logits", "max_length"}  # of one certain token
    source = inspect.getsource(GenerationMixin._get_logits_processor)
    names = set(re.findall(r"generation_config\.([a-z]\w*)", source))
    assert len(names) > 20, "the control: this reads the right function"
    assert names - done - no_matter <= set(sealed_generation._NEEDS_LOGITS)


def test_penalties_are_refused_where_nobody_knows_the_words(sealer):
    protected = sealer.protected("llama", "shuffled")
    with pytest.raises(UnsupportedCallError, match=r"^repetition_penalty needs logits"):
        protected.generate(**prompts(1, 5), **GREEDY, repetition_penalty=1.2)


def test_a_prompt_is_needed(sealer):
    with pytest.raises(UnsupportedCallError, match="input_ids"):
        sealer.protected("llama").generate(inputs_embeds=torch.randn(1, 3, 32), **GREEDY)


# --- Gradients ---


def gradients(model: PreTrainedModel, names: list[str]) -> tuple[float, list[torch.Tensor]]:
    inputs = prompts(2, 9)
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    return loss.item(), [model.get_parameter(name).grad.clone() for name in names]  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-neox"])
def test_gradients_go_through_the_sealed_head(sealer, family):
    original, protected = sealer.original(family), sealer.protected(family, rights=TUNE)
    mine = [name for name, value in protected.named_parameters() if value.ndim == 2]
    theirs = [re.sub(r"\.(\d+)\.", lambda match: f".{int(match[1]) + 1}.", name) for name in mine]
    loss, found = gradients(protected, mine)
    expected_loss, expected = gradients(original, theirs)
    assert loss == pytest.approx(expected_loss, abs=1e-4)
    assert found
    for ours, original_gradient in zip(found, expected, strict=True):
        assert float(original_gradient.abs().max()) > 0
        torch.testing.assert_close(ours, original_gradient, atol=1e-5, rtol=1e-3)


def test_gradients_need_the_right(sealer):
    protected = sealer.protected("llama", rights=FULL)
    with pytest.raises(EnclaveError, match="does not allow gradients") as caught:
        gradients(protected, [])
    assert caught.value.code == "lease"


# --- The bundle ---


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "gpt2", "gpt-neox"])
def test_the_sealed_head_is_in_no_open_file(sealer, family):
    original, bundle = sealer.original(family), sealer.bundle(family)
    manifest = parse_manifest((bundle / "semiopen.json").read_bytes())
    weights = [bundle.parent / "model" / "model.safetensors"]
    pieces = sample_pieces(weights, manifest)
    projection = original.get_output_embeddings().weight.detach()
    rows = [projection[row].numpy().tobytes()[:48] for row in (0, 50, VOCAB - 1)]
    norm = (
        getattr(
            original.base_model,
            {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}.get(original.config.model_type, "norm"),
        )
        .weight.detach()
        .numpy()
        .tobytes()[:48]
    )
    pieces += [*rows, norm]
    files = [path for path in bundle.rglob("*") if path.is_file()]
    assert sum(search(pieces, weights).found.values()) == len(pieces), "the control: they are in the original's file"
    assert search(pieces, files).found == {}
    for path in bundle.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert all(VOCAB not in file.get_slice(name).get_shape() for name in file.keys())  # noqa: SIM118
    assert manifest.open_embedding is False


def test_a_shuffled_head_has_all_its_words_elsewhere(sealer):
    """Its rows are open, so what hides is their order alone: a fresh one for each bundle."""
    original = sealer.original("llama").get_output_embeddings().weight.detach()
    with safe_open(sealer.bundle("llama", "shuffled") / "model.safetensors", framework="pt") as file:
        shuffled = file.get_tensor("lm_head.weight")
    fixed = (shuffled == original).all(dim=1).sum()
    assert fixed < 10
    assert torch.equal(shuffled[shuffled[:, 0].argsort()], original[original[:, 0].argsort()])


@pytest.mark.parametrize(("head", "needed"), [("sealed", True), ("shuffled", True)])
def test_such_bundles_need_a_lease(sealer, head, needed):
    bundle = sealer.bundle("llama", head)
    assert parse_manifest((bundle / "semiopen.json").read_bytes()).lease_required is needed


def test_a_lease_can_be_asked_for_by_any_bundle(sealer, tmp_path, enclave_threads):
    sealer.original("llama")
    for name, require in (("leased", True), ("free", False)):
        manifest = semiopen.seal(
            sealer.bundle("llama").parent / "model", tmp_path / name, sealer.keys, prefix=1, require_lease=require
        )
        assert (manifest.plan.head, manifest.lease_required) == ("open", require)
    enclave_threads.start(tmp_path / "free", sealer.keys)
    with pytest.raises(LeaseError, match="needs a lease of the vendor's; give it with --lease FILE"):
        enclave_threads.start(tmp_path / "leased", sealer.keys)


def test_without_a_lease_nothing_is_opened(sealer, enclave_threads):
    with pytest.raises(LeaseError, match="needs a lease of the vendor's; give it with --lease FILE"):
        enclave_threads.start(sealer.bundle("llama"), sealer.keys)


def test_the_lease_of_another_bundle_is_refused(sealer, enclave_threads):
    other = new_lease(sealer.bundle("llama", "shuffled"), sealer.keys, "acme")
    with pytest.raises(LeaseError, match="for another bundle"):
        enclave_threads.start(sealer.bundle("llama"), sealer.keys, lease=other)


def test_a_lease_is_made_for_ones_own_bundle_alone(sealer, tmp_path):
    from semiopen.vendor.keys import generate_keys

    generate_keys(tmp_path / "other")
    with pytest.raises(semiopen.SemiopenError, match="vendor"):
        new_lease(sealer.bundle("llama"), tmp_path / "other", "acme")
    assert load_vendor_key(tmp_path / "other") != load_vendor_key(sealer.keys)


# --- The end of a lease ---


@pytest.mark.parametrize("head", ["sealed", "shuffled"])
def test_a_budget_stops_at_exactly_its_token(sealer, head):
    protected, enclave = sealer.open("llama", head, tokens=20)
    seen: list[int] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            seen.extend(value.reshape(-1).tolist())

        def end(self) -> None:
            raise AssertionError("it did not end")

    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 50, "eos_token_id": None}
    with pytest.raises(EnclaveError, match="0 of 20 tokens left and this needs more; ask the vendor") as caught:
        protected.generate(**prompts(1, 8), **how, streamer=Streamer())
    assert caught.value.code == "lease"
    # Its prompt took 8; each token but the last went through the prefix as well: 8 + 12.
    assert len(seen) == 8 + 13
    assert enclave.server.used == (20, 13)
    expected = sealer.original("llama").generate(**prompts(1, 8), **{**how, "max_new_tokens": 13})
    assert seen == expected[0].tolist()
    status = session_of(protected).client.status()
    assert (status.used, status.left) == (20, 0)
    with pytest.raises(EnclaveError, match="0 of 20"):
        protected.generate(**prompts(1, 1), **how)


def test_a_lease_that_ends_during_a_run(sealer):
    protected, enclave = sealer.open("llama")
    inputs = prompts(1, 6)
    same(sealer.original("llama"), protected, inputs)
    meter = enclave.server._meter
    meter._wall = lambda: float(meter.lease.exp)  # type: ignore[union-attr]
    for request in (
        lambda: protected.generate(**inputs, **GREEDY),
        lambda: session_of(protected).client.choose(torch.randn(1, 32), [RowChoice()], "vllm"),
    ):
        with pytest.raises(EnclaveError, match=r"The lease ended at .* ask the vendor for another") as caught:
            request()
        assert caught.value.code == "lease"
    meter._wall = lambda: 0.0  # set back: its own clock still runs
    same(sealer.original("llama"), protected, inputs)


def test_a_step_that_the_lease_refuses_leaves_no_trace(sealer):
    """With more time, the conversation goes on as if nothing had been."""
    protected, enclave = sealer.open("llama", rate=12)
    expected = sealer.original("llama").generate(**prompts(1, 8), **GREEDY)
    cache = None
    tokens, refusals = prompts(1, 8)["input_ids"], 0
    meter = enclave.server._meter
    while tokens.shape[1] < 20:
        try:
            out = protected.generate(
                tokens, past_key_values=cache, do_sample=False, max_new_tokens=1, return_dict_in_generate=True
            )
            tokens, cache = out.sequences, out.past_key_values
        except EnclaveError as error:
            assert error.code == "lease"
            assert "12 tokens a minute" in str(error)
            refusals += 1
            meter._filled -= 60
            if cache is not None:
                cache.crop(tokens.shape[1] - 1)  # its last token went through, and only the choice was refused
    assert refusals > 0
    assert torch.equal(tokens, expected)


def test_what_a_lease_allows_is_told(sealer):
    protected, _ = sealer.open("llama", rights=TOP, tokens=500, rate=1000)
    welcome = session_of(protected).client.welcome
    assert welcome.lease is not None
    assert (welcome.lease.customer, welcome.lease.tokens, welcome.lease.rate) == ("acme", 500, 1000)
    assert (welcome.head, welcome.rights) == ("sealed", TOP)
