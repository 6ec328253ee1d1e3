"""Every way to call the host's model is right, or refused in a sentence; none is silently wrong."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache, StaticCache

from semiopen.errors import EnclaveError, UnsupportedCallError
from tests.models import VOCAB, random_model
from tests.test_families import GREEDY, padded, random_prompts

# One model whose windows, padding and positions can all go wrong, and one with learned positions.
BOTH = pytest.mark.parametrize("family", ["mistral-window", "gemma3", "gpt2"])


def same(pair, **kwargs):
    original, protected = pair
    expected = original.generate(**kwargs)
    assert torch.equal(protected.generate(**kwargs), expected)
    return expected


@BOTH
def test_beam_search(sealed_pair, family):
    same(sealed_pair(family, 2), **padded([5, 19]), **GREEDY, num_beams=4, num_return_sequences=2)


@BOTH
def test_sampling_with_a_seed(sealed_pair, family):
    original, protected = sealed_pair(family, 2)
    settings = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": 3}
    torch.manual_seed(5)
    expected = original.generate(**padded([5, 19]), **settings)
    torch.manual_seed(5)
    assert torch.equal(protected.generate(**padded([5, 19]), **settings), expected)


@BOTH
def test_prompt_lookup_crops_the_cache(sealed_pair, family):
    repeating = random_prompts(1, 6).repeat(1, 6)
    same(sealed_pair(family, 2), input_ids=repeating, **GREEDY, prompt_lookup_num_tokens=4)


@BOTH
def test_assistant_model_crops_the_cache(sealed_pair, family):
    original, protected = sealed_pair(family, 2)
    assistant = copy.deepcopy(original)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.05)  # guesses well, not always
    prompt = random_prompts(1, 25)
    settings = {**GREEDY, "suppress_tokens": [0]}  # generate takes the padding id in a text for padding
    expected = original.generate(prompt, **settings)
    assert torch.equal(protected.generate(prompt, **settings, assistant_model=assistant), expected)
    expected = assistant.generate(prompt, **settings)
    assert torch.equal(assistant.generate(prompt, **settings, assistant_model=protected), expected)


@BOTH
def test_a_conversation_reuses_its_cache(sealed_pair, family):
    original, protected = sealed_pair(family, 2)
    caches = [DynamicCache(config=model.config) for model in (original, protected)]
    texts = [random_prompts(1, 11)] * 2
    for turn in range(3):
        for i, model in enumerate((original, protected)):
            mask = torch.ones_like(texts[i])  # without, generate guesses it from padding ids in the text
            texts[i] = model.generate(texts[i], attention_mask=mask, past_key_values=caches[i], **GREEDY)
        assert torch.equal(texts[0], texts[1])
        texts = [torch.cat([text, random_prompts(1, 5, seed=turn)], dim=1) for text in texts]


def test_a_cache_without_config_is_followed_too(sealed_pair):
    original, protected = sealed_pair("llama", 2)
    prompt = random_prompts(2, 9)
    expected = original.generate(prompt, **GREEDY)
    assert torch.equal(protected.generate(prompt, past_key_values=DynamicCache(), **GREEDY), expected)


@BOTH
def test_a_prompt_cache_can_be_copied_for_several_answers(sealed_pair, family):
    original, protected = sealed_pair(family, 2)
    shared = random_prompts(1, 21)  # ends inside a KV block, which the copies must not share when they write
    cache = DynamicCache(config=protected.config)
    with torch.no_grad():
        protected(shared, past_key_values=cache, use_cache=True)
    free = protected.enclave.session.pool.free
    for seed in range(3):
        question = torch.cat([shared, random_prompts(1, 4, seed)], dim=1)
        fork = copy.deepcopy(cache)
        answer = protected.generate(question, past_key_values=fork, **GREEDY)
        assert torch.equal(answer, original.generate(question, **GREEDY))
    del fork
    assert protected.enclave.session.pool.free == free, "a finished answer must free its blocks"


@pytest.mark.parametrize("configured", [True, False])  # without, a cache makes its layers in the first forward
@pytest.mark.parametrize("prefix", [2, 4])
@BOTH
def test_token_by_token_equals_all_at_once(sealed_pair, family, prefix, configured):
    original, protected = sealed_pair(family, prefix)
    text = random_prompts(2, 30)
    cache = DynamicCache(config=protected.config) if configured else DynamicCache()
    with torch.no_grad():
        expected = original(text).logits
        steps = [protected(text[:, :13], past_key_values=cache, use_cache=True).logits]
        steps += [protected(text[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(13, 30)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=2e-4, atol=2e-4)


@BOTH
def test_right_padding_without_cache(sealed_pair, family):
    original, protected = sealed_pair(family, 2)
    ids = random_prompts(3, 20)
    mask = (torch.arange(20)[None] < torch.tensor([20, 7, 1])[:, None]).long()
    with torch.no_grad():
        expected = original(ids, attention_mask=mask, use_cache=False).logits
        logits = protected(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=2e-4, atol=2e-4)


def test_a_batch_larger_than_the_kv_cache_is_run_in_parts(sealed_pair, monkeypatch):
    original, protected = sealed_pair("llama", 2)
    pool = protected.enclave.session.pool
    held = [pool.take() for _ in range(pool.free - 5)]
    try:
        ids = random_prompts(8, 40)
        with torch.no_grad():
            torch.testing.assert_close(
                protected(ids, use_cache=False).logits,
                original(ids, use_cache=False).logits,
                rtol=2e-4,
                atol=2e-4,
            )
        with pytest.raises(EnclaveError, match="full; use a smaller batch"):
            protected.generate(ids, **GREEDY)
    finally:
        for block in held:
            pool.release(block)
    same(sealed_pair("llama", 2), input_ids=random_prompts(1, 10), **GREEDY)


def test_what_an_earlier_sequence_left_in_a_block_does_no_harm(sealed_pair, enclave_threads):
    """Not even NaN, which a mask would not hide: zero times NaN is NaN."""
    _original, protected = sealed_pair("llama", 2)
    same(sealed_pair("llama", 2), input_ids=random_prompts(3, 60), **GREEDY)
    (server,) = [e.server for e in enclave_threads.started if e.path.as_posix() == _socket_of(protected)]
    caches = [cache for client in server._clients for pair in client.session.cache._layers.values() for cache in pair]
    assert caches
    with torch.inference_mode():
        for cache in caches:
            cache.fill_(float("nan"))
    same(sealed_pair("llama", 2), **padded([5, 19, 33]), **GREEDY)


def _socket_of(model) -> str:
    return model.enclave.session.client._socket.getpeername()


def test_several_threads_share_a_model(sealed_pair):
    original, protected = sealed_pair("llama", 2)
    prompts = [random_prompts(2, 10 + i, seed=i) for i in range(6)]
    expected = [original.generate(prompt, **GREEDY) for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda prompt: protected.generate(prompt, **GREEDY), prompts))
    assert all(torch.equal(answer, right) for answer, right in zip(answers, expected, strict=True))


def test_generation_frees_all_blocks(sealed_pair):
    _, protected = sealed_pair("llama", 2)
    pool = protected.enclave.session.pool
    free = pool.free
    protected.generate(**padded([5, 40]), **GREEDY, num_beams=3)
    assert pool.free == free


def test_hidden_states_and_gradients_stay_on_the_host(sealed_pair):
    original, protected = sealed_pair("llama", 2)
    ids = random_prompts(2, 12)
    outputs = protected(ids, labels=ids, output_hidden_states=True)
    reference = original(ids, labels=ids, output_hidden_states=True)
    torch.testing.assert_close(outputs.loss, reference.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs.hidden_states[0], reference.hidden_states[2], rtol=1e-5, atol=1e-5)
    outputs.loss.backward()
    reference.loss.backward()
    mine, theirs = (
        protected.model.layers[0].mlp.up_proj.weight.grad,
        original.model.layers[2].mlp.up_proj.weight.grad,
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    for model in (original, protected):
        model.zero_grad()


def test_a_wrong_sealed_block_changes_the_tokens(sealed_pair, enclave_threads):
    """The control of every equality above: with a slightly wrong prefix they would not hold."""
    original, _ = sealed_pair("llama", 2)
    wrong = random_model(original.config, seed=0)
    with torch.no_grad():
        wrong.model.layers[0].mlp.down_proj.weight.mul_(1.05)
    prompts = padded([3, 30, 17, 1])
    assert not torch.equal(wrong.generate(**prompts, **GREEDY), original.generate(**prompts, **GREEDY))


# --- What is refused ---


def refused(match: str):
    return pytest.raises(UnsupportedCallError, match=match)


def test_embeddings_are_refused(sealed_pair):
    _, protected = sealed_pair("llama", 2)
    with refused("pass input_ids"):
        protected(inputs_embeds=torch.zeros(1, 3, 32))


def test_prepared_masks_are_refused(sealed_pair):
    _, protected = sealed_pair("llama", 2)
    with refused("four-dimensional"):
        protected(random_prompts(1, 4), attention_mask=torch.ones(1, 1, 4, 4))


def test_packed_sequences_are_refused(sealed_pair):
    _, protected = sealed_pair("llama", 2)
    with refused("one by one"):
        protected(random_prompts(1, 6), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))


def test_left_padding_without_positions_is_refused_where_positions_are_learned(sealed_pair):
    _, protected = sealed_pair("gpt2", 2)
    with refused("cumsum"):
        protected(**padded([3, 6]))


def test_a_static_cache_is_refused(sealed_pair):
    _, protected = sealed_pair("llama", 2)
    with refused("StaticCache cannot follow"):
        protected(random_prompts(1, 4), past_key_values=StaticCache(config=protected.config, max_cache_len=16))


def test_a_cache_that_the_enclave_has_not_seen_is_refused(sealed_pair):
    original, protected = sealed_pair("llama", 2)
    cache = DynamicCache()
    original(random_prompts(1, 4), past_key_values=cache, use_cache=True)
    with refused("has not seen"):
        protected(random_prompts(1, 1), past_key_values=cache)


def test_a_cache_changed_behind_the_enclave_is_refused(sealed_pair):
    _, protected = sealed_pair("llama", 2)
    cache = DynamicCache(config=protected.config)
    protected(random_prompts(1, 4), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :2], layer.values[:, :, :2]
    with refused("did not see"):
        protected(random_prompts(1, 1), past_key_values=cache)


def test_a_cache_of_another_model_is_refused(sealed_pair):
    _, protected = sealed_pair("llama", 2)
    _, other = sealed_pair("llama", 1)
    cache = DynamicCache(config=protected.config)
    protected(random_prompts(1, 4), past_key_values=cache, use_cache=True)
    with refused("another model"):
        other(random_prompts(1, 1), past_key_values=cache)


def test_a_mask_that_changes_the_past_is_refused(sealed_pair):
    _, protected = sealed_pair("llama", 2)
    cache = DynamicCache(config=protected.config)
    batch = padded([3, 6])
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    protected(**batch, position_ids=positions, past_key_values=cache, use_cache=True)
    with refused("other past tokens"):
        protected(random_prompts(2, 1), past_key_values=cache, attention_mask=torch.ones(2, 7))


def test_saving_and_resizing_are_refused(sealed_pair, tmp_path):
    _, protected = sealed_pair("llama", 2)
    with refused("save an adapter"):
        protected.save_pretrained(tmp_path)
    with refused("cannot be resized"):
        protected.resize_token_embeddings(300)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_cannot_be_pickled(sealed_pair):
    _, protected = sealed_pair("llama", 2)
    cache = protected(random_prompts(1, 4), use_cache=True).past_key_values
    with pytest.raises(EnclaveError, match="cannot be pickled"):
        pickle.dumps(cache)


def test_a_token_outside_the_vocabulary_is_refused(sealed_pair):
    _, protected = sealed_pair("llama", 2)
    for bad in (VOCAB, -1):
        with pytest.raises(ValueError, match="outside the vocabulary of 199"):
            protected(torch.tensor([[5, bad]]))
    same(sealed_pair("llama", 2), input_ids=random_prompts(1, 10), **GREEDY)


def test_a_prompt_longer_than_the_context_is_refused(sealed_pair):
    _, protected = sealed_pair("llama", 2)
    with pytest.raises(EnclaveError, match="257 tokens is longer than this model's context of 256"):
        protected(random_prompts(1, 257))
    with pytest.raises(EnclaveError, match="context of 256"):
        protected.generate(random_prompts(1, 250), **GREEDY)
    same(sealed_pair("llama", 2), input_ids=random_prompts(1, 10), **GREEDY)
