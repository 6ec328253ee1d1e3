"""The real server on loopback, in a thread with its own event loop."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from semiopen.host.serving.api import Settings, create_app
from semiopen.host.serving.server import Server, listen, make_server

MODEL = Path(__file__).parents[2] / "lab" / "models" / "stories-4m"
TOKENIZER = AutoTokenizer.from_pretrained(MODEL)


def ids(text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    return TOKENIZER.encode(text, add_special_tokens=False)


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    port: int
    engine: Any
    server: Server
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    def call(self, function: Callable[[], object]) -> None:
        """Run a function in the server's event loop."""
        self.loop.call_soon_threadsafe(function)

    def end(self) -> None:
        """Ask for the end, as a signal does, and wait for it."""
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def running(engine: Any, grace: float = 5.0, tokenizer: Any = TOKENIZER, **settings: Any) -> Iterator[Running]:
    """Serve an engine until the end of the block."""
    app = create_app(engine, tokenizer, Settings(**{"model": "tiny", "fingerprint": "fp_test", **settings}))
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = make_server(app, engine, grace)
    started = threading.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        task = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.001)
        started.set()
        await task

    def run() -> None:
        with listener, asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(10)
    served = Running(f"http://127.0.0.1:{port}", port, engine, server, loop, thread)
    try:
        yield served
    finally:
        if thread.is_alive():
            served.end()
