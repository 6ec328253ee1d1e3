#!/usr/bin/env python3
"""Mixed load on `semiopen serve` for an hour: clients that vanish, malformed requests, a killed enclave.

    python benchmarks/soak.py --quick                     # two minutes
    python benchmarks/soak.py --out docs/results/soak.json

The server is the real command in a process of its own, on loopback, with a dev enclave, in fp32 on the repository's
trained model. The original, unprotected model says beforehand what each prompt's greedy tokens are. Clients then send
a seeded mix of requests; every --kill-every seconds the enclave is killed with SIGKILL under load.

It fails (exit status 1) when
- an answer with status 200 has another text than the original model, or a seeded one another than the time before;
- a malformed request is not refused with its status and OpenAI's error form, or any request ends in a status that
  nothing explains (503 is explained for --recovery seconds after a kill, 429 by a full queue);
- after the load, with all clients gone, the server still counts a running or waiting request or a held KV block;
- the server is not ready again --recovery seconds after a kill;
- memory grew: the server's resident memory in the last quarter is above that in the second by more than --growth.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from common import STORIES, finish, machine, make_keys, print_machine, print_table, progress, say, seal, workspace
from transformers import AutoModelForCausalLM, AutoTokenizer

BEGINNINGS = (
    "Once upon a time",
    "The little dog was",
    "One day, a girl named Lily went to the park",
    "Tom and Sue wanted to play with the ball",
    "There was a big tree in the garden and a bird lived in it. The bird",
    "Mom said it was time for bed, but Ben",
)
LONG = " They went to the park and played with the ball and saw a dog and a cat and a bird." * 8
NEW_TOKENS = 48


@dataclass
class Findings:
    """What happened so far."""

    answers: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    enclave_memory: list[tuple[float, float]] = field(default_factory=list)
    seeded: dict[int, str] = field(default_factory=dict)


class Server:
    """`semiopen serve` in a process of its own."""

    def __init__(self, bundle: Path, keys: Path, log: Path, options: argparse.Namespace) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "semiopen.cli", "serve", str(bundle), "--keys", str(keys)]
        command += ["--port", str(self.port), "--engine", options.engine, "--dtype", "float32"]
        command += [
            "--max-running",
            "8",
            "--max-waiting",
            "16",
            "--kv-tokens",
            "4096",
            "--threads",
            str(options.threads),
        ]
        self.log = log
        with log.open("w") as out:
            self.process = psutil.Popen(command, stdout=out, stderr=out)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def enclaves(self) -> list[psutil.Process]:
        """Its enclave process, if one runs."""
        found = []
        for child in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "semiopen.enclave" in child.cmdline():
                    found.append(child)
        return found

    def close(self) -> None:
        """Stop it as a service manager would; kill it if it does not go."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except psutil.TimeoutExpired:
            self.process.kill()


def expected_texts(prompts: list[str]) -> dict[str, str]:
    """What the original model continues each prompt with, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    model: Any = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    texts = {}
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
        texts[prompt] = tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


# Request body (or raw bytes) and the status that refuses it.
MALFORMED: list[tuple[Any, int]] = [
    (b"{", 400),
    (b"\xff\xfe", 400),
    ({"prompt": 5}, 400),
    ({}, 400),
    ({"prompt": "x", "max_tokens": -1}, 400),
    ({"prompt": "x", "temperature": "hot"}, 400),
    ({"prompt": "x", "n": 10_000}, 400),
    ({"prompt": [5, 10**9]}, 400),
    ({"prompt": [-1]}, 400),
    ({"prompt": "word " * 5000}, 400),
    ({"prompt": "x", "model": "another"}, 404),
    ({"prompt": "x" * (9 << 20)}, 413),
]


class Load:
    """The clients."""

    def __init__(self, server: Server, expected: dict[str, str], options: argparse.Namespace) -> None:
        self.server, self.expected, self.options = server, expected, options
        self.found = Findings()
        self.until = time.monotonic() + options.seconds
        limits = httpx.Limits(max_connections=256)  # a burst must reach the queue, not wait here
        self.http = httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits)

    def recovering(self) -> bool:
        """Whether an enclave was killed a moment ago."""
        return bool(self.found.kills) and time.monotonic() - self.found.kills[-1] < self.options.recovery

    async def client(self, number: int) -> None:
        """One client: a seeded sequence of requests of all kinds, one after the other."""
        draw = random.Random(self.options.seed * 1000 + number)
        kinds = [self.plain, self.stream, self.vanish, self.seeded, self.malformed, self.many]
        while time.monotonic() < self.until:
            kind = draw.choices(kinds, weights=(30, 20, 20, 10, 15, 5))[0]
            try:
                await kind(draw)
            except httpx.TransportError as error:
                self.unexplained(f"{kind.__name__}: {type(error).__name__}")
            except asyncio.CancelledError:
                raise
            await asyncio.sleep(draw.expovariate(1 / self.options.pause))

    async def plain(self, draw: random.Random) -> None:
        """A whole answer, compared with the original's."""
        prompt = draw.choice(list(self.expected))
        answer = await self.http.post("/v1/completions", json=self._body(prompt))
        if self._fine(answer, "plain"):
            self._compare(prompt, answer.json()["choices"][0]["text"])

    async def stream(self, draw: random.Random) -> None:
        """A streamed answer, put together and compared."""
        prompt = draw.choice(list(self.expected))
        async with self.http.stream("POST", "/v1/completions", json={**self._body(prompt), "stream": True}) as answer:
            if answer.status_code != 200:
                await answer.aread()
                self._fine(answer, "stream")
                return
            text, done = "", False
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        self._explain(f"stream error {event['error'].get('code')}", 503)
                        return
                    text += event["choices"][0]["text"]
        if done:
            self.found.answers["stream"] += 1
            self._compare(prompt, text)
        else:
            self.unexplained("a stream ended without [DONE]")

    async def vanish(self, draw: random.Random) -> None:
        """A client that hangs up: before the first byte, or in the middle of a stream."""
        prompt, delay = draw.choice(list(self.expected)), draw.random() * 0.3
        body = json.dumps({**self._body(prompt), "stream": draw.random() < 0.5}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        writer.write(head.encode() + b"\r\n\r\n" + body)
        await writer.drain()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(reader.read(200), delay)
        writer.transport.abort()
        self.found.answers["vanished"] += 1

    async def seeded(self, draw: random.Random) -> None:
        """A sampled answer: the same seed must give the same text whatever else runs."""
        seed = draw.randrange(8)
        body = {**self._body(BEGINNINGS[seed % len(BEGINNINGS)]), "temperature": 1.0, "seed": seed}
        answer = await self.http.post("/v1/completions", json=body)
        if self._fine(answer, "seeded"):
            text = answer.json()["choices"][0]["text"]
            if self.found.seeded.setdefault(seed, text) != text:
                self.found.wrong.append(f"seed {seed} gave two texts")

    async def malformed(self, draw: random.Random) -> None:
        """A request that must be refused, politely."""
        body, status = draw.choice(MALFORMED)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        answer = await self.http.post("/v1/completions", content=content, headers=headers)
        if answer.status_code == status and "message" in answer.json().get("error", {}):
            self.found.answers[f"refused {status}"] += 1
        else:
            self._explain(f"malformed {content[:40]!r}: status {answer.status_code}, not {status}", answer.status_code)

    async def many(self, draw: random.Random) -> None:
        """More at once than the queue holds: some are answered, the others told to come again."""
        prompts = [draw.choice(list(self.expected)) for _ in range(32)]
        answers = await asyncio.gather(*(self.http.post("/v1/completions", json=self._body(p)) for p in prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            if self._fine(answer, "burst"):
                self._compare(prompt, answer.json()["choices"][0]["text"])

    def _body(self, prompt: str) -> dict[str, Any]:
        return {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}

    def _fine(self, answer: httpx.Response, kind: str) -> bool:
        if answer.status_code == 200:
            self.found.answers[kind] += 1
            return True
        if answer.status_code == 429 and "retry-after" in answer.headers:
            self.found.answers["told to retry"] += 1
            return False
        self._explain(f"{kind}: status {answer.status_code} {answer.text[:120]}", answer.status_code)
        return False

    def _explain(self, what: str, status: int) -> None:
        if status == 503 and self.recovering():
            self.found.answers["503 after a kill"] += 1
        elif status == 429:
            self.found.answers["told to retry"] += 1
        else:
            self.unexplained(what)

    def unexplained(self, what: str) -> None:
        """Note what should not have happened."""
        self.found.unexplained.append(f"{self.elapsed():.0f} s: {what}")

    def _compare(self, prompt: str, text: str) -> None:
        if text != self.expected[prompt]:
            self.found.wrong.append(f"{prompt[-30:]!r}: {text[:60]!r}")

    def elapsed(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self.until + self.options.seconds

    async def killer(self) -> None:
        """Kills the enclave now and then, and waits for the server to be ready again."""
        while time.monotonic() < self.until - self.options.recovery:
            await asyncio.sleep(self.options.kill_every)
            enclaves = self.server.enclaves()
            if not enclaves:
                self.unexplained("no enclave to kill")
                continue
            self.found.kills.append(time.monotonic())
            enclaves[0].kill()
            await asyncio.sleep(0.2)
            while not await self.ready():
                if time.monotonic() - self.found.kills[-1] > self.options.recovery:
                    self.unexplained("not ready again")
                    return
                await asyncio.sleep(0.1)
            self.found.recoveries.append(time.monotonic() - self.found.kills[-1])

    async def ready(self) -> bool:
        """Whether the server says it is ready."""
        with contextlib.suppress(httpx.TransportError):
            return (await self.http.get("/health")).status_code == 200
        return False

    async def watcher(self, bar: Any, task: Any) -> None:
        """Samples memory."""
        while time.monotonic() < self.until:
            with contextlib.suppress(psutil.Error):
                self.found.memory.append((self.elapsed(), self.server.process.memory_info().rss / 2**20))
                for enclave in self.server.enclaves():
                    self.found.enclave_memory.append((self.elapsed(), enclave.memory_info().rss / 2**20))
            bar.update(task, completed=int(self.elapsed()))
            bar.refresh()
            await asyncio.sleep(2)

    async def run(self, bar: Any) -> dict[str, float]:
        """All clients until the time is over; returns what the idle server still counts."""
        task = bar.add_task("load", total=self.options.seconds)
        clients = [self.client(number) for number in range(self.options.clients)]
        await asyncio.gather(*clients, self.killer(), self.watcher(bar, task))
        await asyncio.sleep(3)
        text = (await self.http.get("/metrics")).text
        await self.http.aclose()
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total")
        return {name: float(re.findall(rf"^semiopen:{name}\S* (\S+)$", text, re.MULTILINE)[0]) for name in names}


def growth(samples: list[tuple[float, float]], seconds: float) -> float:
    """Median of the last quarter over that of the second."""
    second = [size for at, size in samples if seconds / 4 <= at < seconds / 2]
    last = [size for at, size in samples if at >= 3 * seconds / 4]
    return statistics.median(last) / statistics.median(second)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600, metavar="S", help="length of the load (default: 3600)")
    parser.add_argument("--clients", type=int, default=12, metavar="N", help="clients at once (default: 12)")
    parser.add_argument("--pause", type=float, default=0.3, metavar="S", help="mean pause of a client (default: 0.3)")
    parser.add_argument("--kill-every", type=float, default=180, metavar="S", help="default: 180")
    parser.add_argument("--recovery", type=float, default=60, metavar="S", help="default: 60")
    parser.add_argument("--growth", type=float, default=1.05, metavar="X", help="default: 1.05")
    parser.add_argument("--engine", default="transformers", choices=("transformers", "vllm"))
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--quick", action="store_true", help="two minutes, a kill every 30 seconds")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.kill_every = 100, 30
    return options


def main() -> int:
    """Run the soak."""
    options = parse_arguments()
    about = machine()
    prompts = [beginning + tail for beginning in BEGINNINGS for tail in ("", LONG)]
    with workspace() as space, progress() as bar:
        seal(STORIES, space / "bundle", make_keys(space / "keys"), 2)
        expected = expected_texts(prompts)
        server = Server(space / "bundle", space / "keys", space / "log", options)
        try:
            for _ in range(1200):
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{server.url}/health").status_code == 200:
                        break
                if server.process.poll() is not None:
                    break
                time.sleep(0.1)
            else:
                say("The server did not become ready.")
            if server.process.poll() is not None:
                say((space / "log").read_text()[-3000:])
                return 1
            load = Load(server, expected, options)
            idle = asyncio.run(load.run(bar))
        finally:
            server.close()
        leaked = [prompt for prompt in prompts if prompt in (space / "log").read_text()]
    found = load.found
    grown = growth(found.memory, options.seconds)
    held = {name: value for name, value in idle.items() if name != "num_preemptions_total" and value}
    faults = {
        "wrong texts": len(found.wrong),
        "unexplained answers": len(found.unexplained),
        "held after the load": len(held),
        "memory growth too large": int(grown > options.growth),
        "prompts in the log": len(leaked),
        "no kill recovered": int(not found.recoveries),
    }
    print_machine(about)
    print_table("Answers", ("kind", "number"), sorted(found.answers.items()))
    print_table("Faults", ("kind", "number"), list(faults.items()))
    for line in (found.wrong + found.unexplained)[:20]:
        print(line)
    finish(
        {
            "benchmark": "soak",
            "passed": not any(faults.values()),
            "seconds": options.seconds,
            "engine": options.engine,
            "clients": options.clients,
            "answers": dict(found.answers),
            "faults": faults,
            "held": held,
            "preemptions": idle["num_preemptions_total"],
            "kills": len(found.kills),
            "recovery_seconds": [round(value, 2) for value in found.recoveries],
            "server_memory_growth": round(grown, 4),
            "server_memory_mib": round(found.memory[-1][1], 1),
            "machine": about,
        },
        options.out,
    )
    return int(any(faults.values()))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
