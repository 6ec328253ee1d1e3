"""What the server answers: contents, usage, log-probabilities, streams, and a refusal for all it cannot do."""

import json
import logging

import httpx
import pytest

from semiopen.host.serving.engine import (
    EngineBusy,
    EngineUnavailable,
    LeaseRefused,
    Piece,
    RateLimited,
    RequestRefused,
    TokenLogprob,
)
from tests.serving.fake_engine import FakeEngine
from tests.serving.running_server import TOKENIZER, ids, running

STORY = "Once upon a time there was a little € dog 🐶 named Tim. He liked to play."
SECRET = "xyzzy-prompt-of-a-customer"


@pytest.fixture(scope="module")
def engine():
    return FakeEngine(lambda prompt, sampling: ids(STORY))


@pytest.fixture(scope="module")
def server(engine):
    with running(engine) as served, httpx.Client(base_url=served.url) as client:
        yield client


@pytest.fixture(autouse=True)
def forget(engine):
    engine.asked.clear()


def post(client, path, **body):
    return client.post(f"/v1/{path}", json=body)


def good(response):
    assert response.status_code == 200, response.text
    return response.json()


def events(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def refusal(response, status=400):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert SECRET not in response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


CHAT = [{"role": "user", "content": SECRET}]


def test_a_completion(server, engine):
    answer = good(post(server, "completions", model="tiny", prompt="Once", max_tokens=100))
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["system_fingerprint"] == "fp_test"
    assert answer["choices"][0]["text"] == STORY
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": len(ids(STORY)),
        "total_tokens": 2 + len(ids(STORY)),
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert engine.asked[0].prompt == TOKENIZER.encode("Once")


def test_a_chat(server, engine):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "A story"},
    ]
    answer = good(post(server, "chat/completions", messages=messages, max_completion_tokens=3))
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Once upon a", "refusal": None}
    assert answer["choices"][0]["finish_reason"] == "length"
    expected = [{**messages[0], "role": "system"}, {"role": "user", "content": "Hello"}, *messages[2:]]
    assert engine.asked[0].prompt == TOKENIZER.apply_chat_template(
        expected, add_generation_prompt=True, return_dict=False
    )


def test_without_a_limit_a_chat_may_fill_the_context_and_a_completion_gets_sixteen_tokens(server, engine):
    good(post(server, "chat/completions", messages=CHAT))
    good(post(server, "completions", prompt="Once"))
    chat, completion = engine.asked
    assert chat.sampling.max_tokens == engine.context - len(chat.prompt)
    assert completion.sampling.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("Once", [TOKENIZER.encode("Once")]),
        (["Once", "Two"], [TOKENIZER.encode("Once"), TOKENIZER.encode("Two")]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
def test_all_forms_of_prompts(server, engine, prompt, tokens):
    answer = good(post(server, "completions", prompt=prompt, max_tokens=2, n=2))
    assert sorted(list(asked.prompt) for asked in engine.asked) == sorted(tokens * 2)
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(tokens)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, tokens)), "a prompt counts once, not n times"
    assert answer["usage"]["completion_tokens"] == 2 * 2 * len(tokens)


def test_a_text_that_begins_with_the_beginning_gets_no_second_one(server, engine):
    good(post(server, "completions", prompt="<s>Once"))
    good(post(server, "completions", prompt="<s>Once", add_special_tokens=False))
    good(post(server, "completions", prompt="Once", add_special_tokens=False))
    once = TOKENIZER.encode("Once")
    assert [asked.prompt for asked in engine.asked] == [once, once, once[1:]]


def test_choices_belong_to_their_prompts():
    with running(FakeEngine(lambda prompt, sampling: [*prompt[1:], sampling.seed])) as served:
        prompts = [TOKENIZER.encode(word) for word in ("one", "two", "six")]
        body = {"prompt": prompts, "n": 2, "seed": 70, "return_token_ids": True}
        choices = httpx.post(f"{served.url}/v1/completions", json=body).json()["choices"]
    expected = [[*prompt[1:], 70 + choice] for prompt in prompts for choice in range(2)]
    assert [choice["token_ids"] for choice in choices] == expected


def test_sampling_goes_to_the_engine(server, engine):
    wanted = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "seed": 5,
        "ignore_eos": True,
    }
    good(post(server, "completions", prompt="Once", **wanted, logit_bias={"7": -1}, stop_token_ids=[9]))
    sampling = engine.asked[0].sampling
    assert {name: getattr(sampling, name) for name in wanted} == wanted
    assert sampling.logit_bias == {7: -1}
    assert sampling.stop_token_ids == {9}
    assert sampling.logprobs is None


def test_nulls_and_minus_one_mean_the_defaults(server, engine):
    fields = ("temperature", "top_p", "stop", "n", "logprobs", "stream", "stream_options", "seed", "tools", "user")
    good(post(server, "completions", prompt="Once", top_k=-1, **dict.fromkeys(fields)))
    assert (engine.asked[0].sampling.temperature, engine.asked[0].sampling.top_k) == (1.0, 0)


def test_seeds_of_choices_stay_in_range(server, engine):
    good(post(server, "completions", prompt="Once", seed=2**63 - 1, n=2, max_tokens=1))
    assert [asked.sampling.seed for asked in engine.asked] == [2**63 - 1, -(2**63)]


def test_the_models_own_defaults_apply_where_a_request_says_nothing():
    engine = FakeEngine(lambda prompt, sampling: [])
    with running(engine, sampling={"temperature": 0.7, "top_k": 20}) as served:
        httpx.post(f"{served.url}/v1/completions", json={"prompt": "a"}).raise_for_status()
        httpx.post(f"{served.url}/v1/completions", json={"prompt": "a", "temperature": 0}).raise_for_status()
    assert [(asked.sampling.temperature, asked.sampling.top_k) for asked in engine.asked] == [(0.7, 20), (0, 20)]


def test_a_stream_is_the_answer_in_parts(server):
    chunks = events(post(server, "completions", prompt="Once", max_tokens=100, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == STORY
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert "\ufffd" not in json.dumps(chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_chat_stream_says_who_speaks_and_ends_with_usage(server):
    options = {"include_usage": True}
    response = post(server, "chat/completions", messages=CHAT, max_tokens=50, stream=True, stream_options=options, n=2)
    *chunks, last = events(response)
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["usage"] is None for chunk in chunks)
    for index in range(2):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in mine) == STORY
        assert [choice["finish_reason"] for choice in mine].count("stop") == 1
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2 * len(ids(STORY))


def test_streams_are_safe_for_readers_that_split_lines_at_unicode_separators():
    text = "one\u2028two\u0085three\nfour"
    with running(FakeEngine(lambda prompt, sampling: ids(text))) as served:
        body = {"prompt": "a", "max_tokens": 99, "stream": True}
        raw = httpx.post(f"{served.url}/v1/completions", json=body).text
    chunks = [json.loads(line.removeprefix("data: ")) for line in raw.splitlines() if line and "[DONE]" not in line]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("stop", "shown"), [("little €", "Once upon a time there was a "), (["dog", "per"], None)])
def test_stop_strings(server, engine, stream, stop, shown):
    response = post(server, "completions", prompt="Once", max_tokens=100, stop=stop, stream=stream)
    shown = shown or STORY.partition("dog")[0]
    choices = [chunk["choices"][0] for chunk in (events(response) if stream else [response.json()])]
    assert "".join(choice["text"] for choice in choices) == shown
    assert choices[-1]["finish_reason"] == "stop"
    assert choices[-1]["stop_reason"] == (stop if isinstance(stop, str) else "dog")
    assert engine.aborted.pop() == engine.asked[0].request_id, "the engine went on behind the stop string"


def test_what_looked_like_a_stop_string_at_the_end_is_shown_after_all(server):
    answer = good(post(server, "completions", prompt="Once", max_tokens=100, stop="play. He"))
    assert answer["choices"][0]["text"] == STORY


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs(server, stream):
    body = {"prompt": "Once", "max_tokens": 40, "logprobs": 2, "stream": stream, "stop": "named"}
    response = post(server, "completions", **body)
    shown = STORY.partition("named")[0]
    parts = [chunk["choices"][0]["logprobs"] for chunk in (events(response) if stream else [response.json()])]
    tokens, offsets, scores, tops = (
        [entry for part in parts for entry in part[name]]
        for name in ("tokens", "text_offset", "token_logprobs", "top_logprobs")
    )
    given = ids(STORY)[: len(tokens)]
    assert scores == [-token / 1000 for token in given]
    assert all(len(top) >= 1 and max(top.values()) == score for top, score in zip(tops, scores, strict=True))
    assert any(token.startswith("bytes:\\x") for token in tokens), "half characters have names"
    assert tokens[-1] == " named", "a token whose first character shows is reported, and none behind it"
    for token, offset in zip(tokens, offsets, strict=True):
        if not token.startswith("bytes:"):
            assert shown[offset:].startswith(token) or token == " named"[: len(token)]


def test_echo_scores_the_prompt(server, engine):
    """As lm-eval asks for it: the prompt's tokens, and one more at the end, which it drops."""
    prompt = TOKENIZER.encode("Once upon")
    answer = good(post(server, "completions", prompt=[prompt], max_tokens=1, logprobs=1, echo=True, temperature=0))
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [None, *(-token / 1000 for token in [*prompt[1:], ids(STORY)[0]])]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["tokens"] == ["<s>", "Once", " upon", "Once"]
    assert answer["choices"][0]["text"].endswith("Once uponOnce")
    assert engine.asked[0].sampling.ignore_eos, "at the end of a text there would be no token to drop"


def test_echo_alone_needs_no_engine(server, engine):
    answer = good(post(server, "completions", prompt="Once upon", max_tokens=0, echo=True))
    assert answer["choices"][0]["text"] == "Once upon"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert not engine.asked
    scored = good(post(server, "completions", prompt="Once upon", max_tokens=0, echo=True, logprobs=0))
    assert scored["choices"][0]["logprobs"]["tokens"] == ["<s>", "Once", " upon"]
    assert engine.asked[0].sampling.max_tokens == 0


def test_echo_in_a_stream(server):
    chunks = events(post(server, "completions", prompt="Hi.", max_tokens=3, echo=True, stream=True, logprobs=1))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hi.Once upon a"
    offsets = [offset for chunk in chunks for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert offsets[-3:] == [3, 7, 12]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(server, stream):
    body = {"messages": CHAT, "max_tokens": 20, "logprobs": True, "top_logprobs": 3, "stream": stream}
    response = post(server, "chat/completions", **body)
    chunks = events(response) if stream else [response.json()]
    content = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {}).get("content", [])]
    assert len(content) == 20
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode(errors="ignore") in STORY
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)


def test_minus_infinity_is_a_number_in_json():
    async def generate(request_id, prompt, sampling, salt):
        yield Piece((7,), (TokenLogprob(-1.0, ((7, -1.0), (8, float("-inf")))),), finish="stop")

    engine = FakeEngine(lambda prompt, sampling: [])
    engine.generate = generate
    with running(engine) as served:
        raw = httpx.post(f"{served.url}/v1/completions", json={"prompt": "a", "logprobs": 2}).text
    assert "Infinity" not in raw
    assert -9999.0 in json.loads(raw)["choices"][0]["logprobs"]["top_logprobs"][0].values()


def test_special_tokens_show_only_when_asked_for(server):
    with running(FakeEngine(lambda prompt, sampling: [3, *ids("Hi"), 4])) as served:
        texts = [
            httpx.post(f"{served.url}/v1/completions", json={"prompt": "a", "skip_special_tokens": skip}).json()
            for skip in (True, False)
        ]
    assert [answer["choices"][0]["text"] for answer in texts] == ["Hi", "<|system|>Hi<|user|>"]


def test_several_tokens_at_once():
    with running(FakeEngine(lambda prompt, sampling: ids(STORY), tokens_per_piece=5)) as served:
        body = {"prompt": "a", "max_tokens": 99, "stop": " dog", "stream": True, "logprobs": 1}
        chunks = events(httpx.post(f"{served.url}/v1/completions", json=body))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == STORY.partition(" dog")[0]


def test_models_and_small_things(server):
    assert [model["id"] for model in good(server.get("/v1/models"))["data"]] == ["tiny"]
    assert good(server.get("/v1/models/tiny"))["max_model_len"] == 128
    assert refusal(server.get("/v1/models/other"), 404)["code"] == "model_not_found"
    assert good(server.get("/version"))["version"]
    assert server.get("/live").status_code == 200
    tokens = good(server.post("/tokenize", json={"prompt": "Once upon", "return_token_strs": True}))
    assert tokens["tokens"] == TOKENIZER.encode("Once upon")
    assert tokens["count"] == len(tokens["token_strs"]) == 3
    assert good(server.post("/detokenize", json={"tokens": tokens["tokens"]}))["prompt"] == "<s>Once upon"
    chat = good(server.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]}))
    assert TOKENIZER.decode(chat["tokens"]) == "<s><|user|>Hi<|assistant|>"


REFUSED = [
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [2048]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": ["a"] * 129}, "n"),
    ({"n": 129}, "n"),
    ({"prompt": ["a"] * 65, "n": 2}, "n"),
    ({"n": 0}, "n"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": SECRET}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 10**30}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"2048": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"seed": 1 << 63}, "seed"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop": "a" * 1025}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"min_tokens": 3}, "min_tokens"),
    ({"guided_json": {}}, "guided_json"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_completions_refuse_by_name(server, engine, fields, param):
    error = refusal(post(server, "completions", **{"prompt": SECRET, **fields}))
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert not engine.asked


TOOL = [{"type": "function", "function": {"name": "f"}}]
CHAT_REFUSED = [
    ({"tools": TOOL}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 5}, "logprobs"),
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": SECRET}, "messages"),
    ({"messages": [{"role": "tool", "content": SECRET}]}, "messages.0.role"),
    ({"messages": [{"role": SECRET, "content": ""}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": TOOL}]}, "messages.0"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": SECRET}]}]}, "messages.0"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
]


@pytest.mark.parametrize(("fields", "param"), CHAT_REFUSED, ids=lambda value: str(value)[:40])
def test_chats_refuse_by_name(server, engine, fields, param):
    assert refusal(post(server, "chat/completions", **{"messages": CHAT, **fields}))["param"] == param
    assert not engine.asked


def test_what_means_nothing_is_accepted(server):
    same = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "min_tokens": 0, "user": "me"}
    good(post(server, "chat/completions", messages=CHAT, max_tokens=1, **same))
    good(post(server, "completions", prompt="a", max_tokens=1, best_of=2, n=2, suffix=""))


def test_unknown_fields_are_ignored_and_told_once_by_name(server, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            good(post(server, "completions", prompt=SECRET, max_tokens=1, temprature=0, **{SECRET: 1}))
    assert caplog.text.count("temprature") == 1
    assert SECRET not in caplog.text


@pytest.mark.parametrize("body", [b"{", b"[]", b'"x"', b"", b'{"prompt": "\xff"}', b"{" * 100_000])
def test_bodies_that_are_no_request(server, body):
    response = server.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    refusal(response)


def test_nan_is_no_temperature(server):
    body = b'{"prompt": "a", "temperature": NaN}'
    response = server.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert refusal(response)["param"] == "temperature"


def test_a_web_page_cannot_post_without_asking(server):
    """Browsers send text/plain across origins without a preflight request."""
    response = server.post("/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
    refusal(response, 415)
    assert "access-control-allow-origin" not in server.get("/v1/models").headers


def test_paths_and_methods_that_do_not_exist(server):
    refusal(server.get("/v1/nothing"), 404)
    assert "POST" in server.get("/v1/completions").headers["allow"]
    refusal(server.get("/v1/completions"), 405)


def test_another_model_is_not_found(server):
    assert refusal(post(server, "completions", model=SECRET, prompt="a"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "fits"),
    [(128, 0, True), (127, 1, True), (128, 1, False), (129, 0, False), (100, 29, False)],
)
def test_the_context_is_a_limit(server, prompt, max_tokens, fits):
    response = post(server, "completions", prompt=[7] * prompt, max_tokens=max_tokens, echo=True)
    if fits:
        good(response)
    else:
        assert refusal(response)["code"] == "context_length_exceeded"


def test_a_chat_beyond_the_context(server):
    messages = [{"role": "user", "content": f"{SECRET} " * 100}]
    error = refusal(post(server, "chat/completions", messages=messages))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


def test_a_model_without_chat_template():
    class Plain:
        """A tokenizer without a template."""

        chat_template = None

        def __getattr__(self, name):
            return getattr(TOKENIZER, name)

    with running(FakeEngine(lambda prompt, sampling: []), tokenizer=Plain()) as served:
        response = httpx.post(f"{served.url}/v1/chat/completions", json={"messages": CHAT})
        assert refusal(response)["code"] == "no_chat_template"
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
    engine = FakeEngine(lambda prompt, sampling: [])
    with running(engine, tokenizer=Plain(), chat_template=template) as served:
        httpx.post(f"{served.url}/v1/chat/completions", json={"messages": CHAT}).raise_for_status()
    assert TOKENIZER.decode(engine.asked[0].prompt, skip_special_tokens=True) == f"user:{SECRET}"


def test_a_template_that_refuses():
    template = "{{ raise_exception('no ' + messages[0]['content']) }}"
    with running(FakeEngine(lambda prompt, sampling: []), chat_template=template) as served:
        response = httpx.post(f"{served.url}/v1/chat/completions", json={"messages": CHAT})
        assert refusal(response)["param"] == "messages"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineBusy("full", 2.3), 429, "queue_full"),
        (RateLimited("Later.", 2.3), 429, "rate_limit_exceeded"),
        (LeaseRefused("Not allowed."), 403, "lease"),
        (EngineUnavailable("gone"), 503, "engine_unavailable"),
        (RequestRefused("Too long."), 400, None),
        (RuntimeError(SECRET), 500, "internal_error"),
    ],
)
def test_what_the_engine_refuses(error, status, code, stream, caplog):
    with running(FakeEngine(lambda prompt, sampling: [], error=error)) as served:
        for extra in ({}, {"n": 3}):
            body = {"prompt": SECRET, "stream": stream, **extra}
            response = httpx.post(f"{served.url}/v1/completions", json=body)
            assert refusal(response, status)["code"] == code
            if status == 429:
                assert response.headers["retry-after"] == "3"
    assert SECRET not in caplog.text
    assert ("fake_engine.py" in caplog.text) == (status == 500), "the place is in the log"


def test_metrics_have_no_prompts(server):
    good(post(server, "completions", prompt=SECRET, max_tokens=5))
    text = server.get("/metrics").text
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_count",
        "prompt_tokens_total",
        "generation_tokens_total",
        "num_preemptions_total",
        "prefix_cache_hits_total",
        "prefix_cache_queries_total",
    ):
        assert f'semiopen:{name}{{model_name="tiny"' in text or f"semiopen:{name}{{" in text, name
    assert 'semiopen:request_success_total{finished_reason="length",model_name="tiny"}' in text
    assert SECRET not in text


def test_metrics_count_tokens():
    with running(FakeEngine(lambda prompt, sampling: ids(STORY))) as served:
        httpx.post(f"{served.url}/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 4}).raise_for_status()
        text = httpx.get(f"{served.url}/metrics").text
    for name, value in (
        ("prompt_tokens_total", 3),
        ("generation_tokens_total", 4),
        ("time_to_first_token_seconds_count", 1),
        ("inter_token_latency_seconds_count", 3),
        ("e2e_request_latency_seconds_count", 1),
    ):
        assert f'semiopen:{name}{{model_name="tiny"}} {value:.1f}' in text
