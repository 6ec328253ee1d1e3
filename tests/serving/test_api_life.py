"""Keys, limits, clients that hang up, crashes and the end: what happens around the answers."""

import asyncio
import concurrent.futures
import json
import socket
import time

import httpx
import pytest

from semiopen.errors import SemiopenError
from semiopen.host.serving import transport
from semiopen.host.serving.launch import read_api_keys
from semiopen.host.serving.server import listen
from tests.serving.fake_engine import FakeEngine
from tests.serving.running_server import ids, running

STORY = "Once upon a time there was a little dog named Tim."
BODY = {"prompt": "a", "max_tokens": 100}
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def talkative(**fields):
    return FakeEngine(lambda prompt, sampling: ids(STORY), **fields)


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def error_code(response):
    return response.json()["error"]["code"]


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        (None, False),
        ("", False),
        ("Bearer", False),
        ("Bearer wrong", False),
        ("Bearer key-one2", False),
        ("Basic key-one", False),
        ("key-one", False),
        ("Bearer key-one", True),
        ("bearer key-two", True),
    ],
)
def test_a_key_opens_the_api(header, allowed):
    with running(talkative(), api_keys=["key-one", "key-two"]) as served:
        headers = {} if header is None else {"authorization": header}
        with httpx.Client(base_url=served.url, headers=headers) as client:
            answers = [
                client.get("/v1/models"),
                client.post("/v1/completions", json=BODY),
                client.post("/tokenize", json={"prompt": "a"}),
                client.get("/openapi.json"),
            ]
            for answer in answers:
                assert answer.status_code == (200 if allowed else 401)
                if not allowed:
                    assert error_code(answer) == "invalid_api_key"
                    assert "key-one" not in answer.text
            assert client.get("/nothing").status_code == (404 if allowed else 401)
            for path in ("/health", "/live", "/metrics", "/version"):
                assert client.get(path).status_code == 200
    assert bool(served.engine.asked) == allowed


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("SEMIOPEN_API_KEY", raising=False)
    assert read_api_keys(None) == ()
    monkeypatch.setenv("SEMIOPEN_API_KEY", "a\nb\n")
    assert read_api_keys(None) == ("a", "b")
    path = tmp_path / "keys"
    path.write_text("# for the team\n one \n\ntwo\n")
    assert read_api_keys(path) == ("one", "two")
    for text in ("", "# nothing\n", "with space\n", "ümlaut\n"):
        path.write_text(text)
        with pytest.raises(SemiopenError) as caught:
            read_api_keys(path)
        assert not text.strip() or text.strip() not in str(caught.value)
    monkeypatch.setenv("SEMIOPEN_API_KEY", "")
    with pytest.raises(SemiopenError, match="SEMIOPEN_API_KEY has no API key"):
        read_api_keys(None)


def test_a_long_body_is_refused_before_it_is_read():
    with running(talkative(), max_body=1000) as served:
        with httpx.Client(base_url=served.url) as client:
            assert client.post("/v1/completions", json=BODY).status_code == 200
            answer = client.post("/v1/completions", json={"prompt": "a" * 1000})
            assert (answer.status_code, error_code(answer)) == (413, "request_too_large")
        announced = HEAD + b"content-length: 9999\r\n\r\n"
        with socket.create_connection(("127.0.0.1", served.port), 5) as connection:
            connection.sendall(announced)
            assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_without_length_is_cut_off():
    def chunks():
        yield b'{"prompt": "'
        for _ in range(10_000):
            yield b"a" * 1000

    headers = {"content-type": "application/json"}
    with running(talkative(), max_body=1000) as served:
        try:
            status = httpx.post(f"{served.url}/v1/completions", content=chunks(), headers=headers).status_code
        except httpx.WriteError:  # the server has closed before all was sent
            status = 413
        assert status == 413
        assert not served.engine.asked


def test_a_body_that_does_not_come(monkeypatch):
    monkeypatch.setattr(transport, "BODY_SECONDS", 0.05)
    head = HEAD + b"content-length: 10\r\n\r\n{"
    with running(talkative()) as served, socket.create_connection(("127.0.0.1", served.port), 5) as connection:
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("extra", [{}, {"n": 3}, {"stream": True}, {"stream": True, "n": 3}], ids=str)
def test_a_client_that_hangs_up_frees_its_place(extra):
    """Also before its first token, and when it waits for the whole answer."""
    for hold in (0, 2):
        with running(talkative(hold=hold)) as served:
            body = json.dumps({**BODY, **extra}).encode()
            with socket.create_connection(("127.0.0.1", served.port), 5) as connection:
                connection.sendall(HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body)
                wait_until(lambda: served.engine.running == extra.get("n", 1))
                if hold and extra.get("stream"):
                    assert b"200 OK" in connection.recv(1000)
                assert not served.engine.aborted
            wait_until(lambda: served.engine.running == 0)
            assert len(served.engine.aborted) == extra.get("n", 1)
            text = httpx.get(f"{served.url}/metrics").text
            assert f'finished_reason="abort",model_name="tiny"}} {extra.get("n", 1)}.0' in text


def test_a_client_that_hangs_up_between_headers_and_first_token(monkeypatch):
    monkeypatch.setattr(transport, "START_SECONDS", 0.02)
    with running(talkative(hold=0)) as served:
        with httpx.stream("POST", f"{served.url}/v1/completions", json={**BODY, "stream": True}) as answer:
            assert answer.status_code == 200
            assert served.engine.running == 1
        wait_until(lambda: served.engine.running == 0)
        assert served.engine.aborted


def test_a_stream_that_waits_long_begins_anyhow(monkeypatch):
    monkeypatch.setattr(transport, "START_SECONDS", 0.02)
    with running(talkative(step=0.1)) as served:
        answer = httpx.post(f"{served.url}/v1/completions", json={**BODY, "max_tokens": 2, "stream": True})
        assert answer.text.endswith("data: [DONE]\n\n")
        assert answer.text.count("data: {") == 2


def test_a_request_may_not_run_for_ever():
    with running(talkative(hold=3), request_seconds=0.15) as served:
        answer = httpx.post(f"{served.url}/v1/completions", json=BODY)
        assert (answer.status_code, error_code(answer)) == (504, "timeout")
        stream = httpx.post(f"{served.url}/v1/completions", json={**BODY, "stream": True})
        last = stream.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert "[DONE]" not in stream.text
        wait_until(lambda: served.engine.running == 0)
        assert len(served.engine.aborted) == 2


def test_a_crash_ends_what_runs_and_the_next_is_served():
    with running(talkative(hold=3)) as served, httpx.Client(base_url=served.url) as client:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            whole = pool.submit(httpx.post, f"{served.url}/v1/completions", json=BODY)
            stream = pool.submit(
                httpx.post,
                f"{served.url}/v1/chat/completions",
                json={
                    "messages": [{"role": "user", "content": "a"}],
                    "stream": True,
                },
            )
            wait_until(lambda: served.engine.running == 2)
            assert client.get("/health").status_code == 200
            served.engine.ready = False
            served.call(served.engine.crash.set)
            assert (whole.result().status_code, error_code(whole.result())) == (503, "engine_unavailable")
            events = stream.result().text.strip().split("\n\n")
            assert "content" in events[0]
            assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "engine_unavailable"
        assert client.get("/health").status_code == 503
        assert client.get("/live").status_code == 200
        served.engine.ready, served.engine.hold, served.engine.crash = True, None, asyncio.Event()
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json=BODY).json()["choices"][0]["text"] == STORY
        assert 'finished_reason="error",model_name="tiny"} 2.0' in client.get("/metrics").text


def test_the_end_waits_for_running_requests():
    with running(talkative(step=0.02)) as served:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            answer = pool.submit(httpx.post, f"{served.url}/v1/completions", json=BODY)
            wait_until(lambda: served.engine.running == 1)
            served.end()
            assert answer.result().json()["choices"][0]["text"] == STORY
        assert served.engine.crash.is_set(), "the engine is closed"
        with pytest.raises(httpx.ConnectError):
            httpx.get(served.url)


def test_the_end_does_not_wait_for_ever():
    with running(talkative(hold=3), grace=0.1) as served, concurrent.futures.ThreadPoolExecutor() as pool:
        stream = pool.submit(httpx.post, f"{served.url}/v1/completions", json={**BODY, "stream": True})
        whole = pool.submit(httpx.post, f"{served.url}/v1/completions", json=BODY)
        wait_until(lambda: served.engine.running == 2)
        served.end()
        assert whole.result().status_code == 503
        assert "engine_unavailable" in stream.result().text


def test_texts_of_one_request_do_not_take_more_places_than_there_are():
    with running(talkative(), side_by_side=2) as served:
        answer = httpx.post(f"{served.url}/v1/completions", json={**BODY, "n": 7}).json()
        assert [choice["text"] for choice in answer["choices"]] == [STORY] * 7
        assert served.engine.most == 2


def test_many_clients_at_once_get_their_own_text():
    engine = FakeEngine(lambda prompt, sampling: [*prompt[-1:], *ids(STORY)], step=0.001)

    async def ask(client, word):
        body = {"prompt": f"a {word}", "max_tokens": 50, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line async for line in answer.aiter_lines() if line.startswith("data: {")]
        return "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines)

    async def all_of(url):
        async with httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=50)) as client:
            return await asyncio.gather(*(ask(client, digit) for digit in "0123456789" * 4))

    with running(engine) as served:
        texts = asyncio.run(all_of(served.url))
    assert texts == [digit + STORY for digit in "0123456789" * 4]


def test_an_address_that_is_taken():
    with listen("127.0.0.1", 0) as taken, pytest.raises(OSError, match="give another --port"):
        taken.listen()
        listen("127.0.0.1", taken.getsockname()[1])
