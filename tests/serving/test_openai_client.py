"""OpenAI's own client against the real server, engine and enclave: the tokens are the original model's."""

import asyncio

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from semiopen.host.serving.engine import EngineBusy, EngineUnavailable
from tests.serving.fake_engine import FakeEngine
from tests.serving.running_server import MODEL, TOKENIZER, ids, running

PROMPT = "Once upon a time"
MESSAGES = [{"role": "user", "content": "Tell me a story about a cat."}]


@pytest.fixture(scope="module")
def client(served_stories):
    with openai.OpenAI(base_url=f"{served_stories.url}/v1", api_key="key-of-tests", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def original():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def continuation(original, tokens, count):
    """What the original says greedily, as text and as log-probabilities of its tokens."""
    prompt = torch.tensor([tokens])
    given = original.generate(prompt, do_sample=False, max_new_tokens=count)[0, len(tokens) :]
    with torch.inference_mode():
        logits = original(torch.cat((prompt[0], given))[None]).logits[0]
    scores = logits.log_softmax(-1)[len(tokens) - 1 : -1].gather(1, given[:, None])[:, 0]
    ended = int(given[-1]) == original.config.eos_token_id
    given, scores = (given[:-1], scores[:-1]) if ended else (given, scores)
    return TOKENIZER.decode(given), scores.tolist(), given.tolist()


def test_models(client):
    assert [model.id for model in client.models.list()] == ["stories"]
    assert client.models.retrieve("stories").owned_by == "semiopen"


def test_a_completion_is_the_originals(client, original):
    text, scores, tokens = continuation(original, TOKENIZER.encode(PROMPT), 32)
    answer = client.completions.create(model="stories", prompt=PROMPT, max_tokens=32, temperature=0, logprobs=1)
    assert answer.choices[0].text == text
    assert answer.usage.completion_tokens == len(tokens)
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx(scores, abs=1e-4)


def test_a_chat_is_the_originals_also_as_a_stream(client, original):
    tokens = TOKENIZER.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    text, scores, given = continuation(original, tokens, 40)
    settings = {"model": "stories", "messages": MESSAGES, "max_completion_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == text
    content = whole.choices[0].logprobs.content
    assert [entry.logprob for entry in content] == pytest.approx(scores, abs=1e-4)
    assert [entry.top_logprobs[0].token for entry in content] == [entry.token for entry in content], "greedy"
    stream = client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage.completion_tokens == len(given)
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}


def test_stop_strings_and_several_choices(client, original):
    text, *_ = continuation(original, TOKENIZER.encode(PROMPT), 60)
    stop = text[30:36]
    answer = client.completions.create(model="stories", prompt=PROMPT, max_tokens=60, temperature=0, stop=[stop], n=2)
    assert [choice.text for choice in answer.choices] == [text.partition(stop)[0]] * 2
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_a_seed_repeats_a_text_and_choices_differ(client):
    def ask(seed):
        answer = client.completions.create(model="stories", prompt=PROMPT, max_tokens=24, seed=seed, n=2, temperature=1)
        return [choice.text for choice in answer.choices]

    first, again, other = ask(1), ask(1), ask(7)
    assert first == again
    assert len({*first, *other}) == 4


def test_many_at_once_get_what_one_gets(served_stories, client):
    prompts = [f"{PROMPT} there was a {animal}" for animal in ("cat", "dog", "bird", "frog", "fish", "bear")]
    settings = {"model": "stories", "max_tokens": 24, "temperature": 0}
    alone = [client.completions.create(prompt=prompt, **settings).choices[0].text for prompt in prompts]

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{served_stories.url}/v1", api_key="key-of-tests") as many:

            async def ask(prompt):
                stream = await many.completions.create(prompt=prompt, stream=True, **settings)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(ask, prompts))

    assert asyncio.run(ask_all()) == alone
    together = client.completions.create(prompt=prompts, **settings)
    assert [choice.text for choice in together.choices] == alone


def test_closing_a_stream_frees_its_place(served_stories, client):
    stream = client.completions.create(
        model="stories", prompt=PROMPT, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert served_stories.engine.load().running == 1
    stream.close()
    for _ in range(200):
        if not served_stories.engine.load().running:
            break
        httpx.get(f"{served_stories.url}/live")
    assert served_stories.engine.load().running == 0


def test_errors_are_openais(served_stories, client):
    def ask(client=client, **fields):
        return client.completions.create(**{"model": "stories", "prompt": PROMPT, "max_tokens": 4, **fields})

    with pytest.raises(openai.BadRequestError) as caught:
        ask(temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(prompt=[7] * 600)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as caught:
        ask(model="gpt-4")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="wrong"))
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="stories", messages=MESSAGES, response_format={"type": "json_object"})
    assert caught.value.param == "response_format"


@pytest.mark.parametrize(
    ("error", "kind"),
    [(EngineBusy("", 1), openai.RateLimitError), (EngineUnavailable(""), openai.InternalServerError)],
)
def test_errors_of_the_engine_are_openais(error, kind):
    with (
        running(FakeEngine(lambda prompt, sampling: [], error=error)) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client,
        pytest.raises(kind),
    ):
        client.completions.create(model="tiny", prompt="a")


def test_a_crash_in_a_stream_is_an_error():
    engine = FakeEngine(lambda prompt, sampling: ids("Once upon a time"), hold=2)
    with (
        running(engine) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client,
        pytest.raises(openai.APIError, match="started again"),
    ):
        for count, _ in enumerate(client.completions.create(model="tiny", prompt="a", stream=True), 1):
            if count == 2:
                served.call(engine.crash.set)


def test_a_full_queue_is_tried_again_by_the_client():
    engine = FakeEngine(lambda prompt, sampling: ids("Once"), error=EngineBusy("", 0.01))
    generate = engine.generate

    async def once_busy(*request):
        async for piece in generate(*request):
            yield piece

    def free(*request):
        stream = once_busy(*request)
        if engine.asked:
            engine.error = None
        return stream

    engine.generate = free
    with running(engine) as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key="any") as client:
        assert client.completions.create(model="tiny", prompt="a").choices[0].text == "Once"
    assert len(engine.asked) == 2
