"""What the server counts, under vLLM's names with the prefix `semiopen:`. Nothing of a request's text is a label."""

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from semiopen.host.serving.engine import Engine

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
FINISHES = ("stop", "length", "abort", "error")


class Metrics:
    """Counters and histograms of one server, with its engine's load."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine, model))
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of the requests served.", model)
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.", model)
        self.first_token = self._histogram("time_to_first_token_seconds", "From a request to its first token.", model)
        self.inter_token = self._histogram("inter_token_latency_seconds", "From a token to the next.", model)
        self.whole = self._histogram("e2e_request_latency_seconds", "From a request to its end.", model)
        ended = Counter(
            "semiopen:request_success",
            "Requests by how they ended: stop, length, abort (the client hung up, or out of time) or error.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self.ended = {reason: ended.labels(model, reason) for reason in FINISHES}

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def _counter(self, name: str, documentation: str, model: str) -> Counter:
        return Counter(f"semiopen:{name}", documentation, ["model_name"], registry=self._registry).labels(model)

    def _histogram(self, name: str, documentation: str, model: str) -> Histogram:
        return Histogram(
            f"semiopen:{name}", documentation, ["model_name"], buckets=_SECONDS, registry=self._registry
        ).labels(model)


class Timeline:
    """One request's times, told to the metrics as they pass.

    Attributes:
        finish: how it ended, as far as is known.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began = time.perf_counter()
        self._last: float | None = None
        self.finish: str | None = None

    def tokens(self, prompt: int, generated: int) -> None:
        """Count tokens that have just come. Of several at once, the time to the next is shared evenly."""
        if prompt:
            self._metrics.prompt_tokens.inc(prompt)
        if not generated:
            return
        now = time.perf_counter()
        self._metrics.generation_tokens.inc(generated)
        if self._last is None:
            self._metrics.first_token.observe(now - self._began)
        else:
            each = (now - self._last) / generated
            for _ in range(generated):
                self._metrics.inter_token.observe(each)
        self._last = now

    def end(self) -> None:
        """Count the request."""
        self._metrics.ended[self.finish or "error"].inc()
        self._metrics.whole.observe(time.perf_counter() - self._began)


class _EngineCollector(Collector):
    """Asks the engine when it is scraped, not at every step."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._model = model

    def collect(self) -> Iterable[Metric]:
        """The engine's load."""
        load = self._engine.load()
        gauges = {
            "num_requests_running": ("Requests in the running batch.", load.running),
            "num_requests_waiting": ("Requests in the queue.", load.waiting),
            "kv_cache_usage_perc": ("Used share of the KV cache, 1 for all of it.", load.kv_usage),
            "engine_ready": ("1 while requests are served, 0 while the engine starts again.", self._engine.ready),
        }
        counters = {
            "num_preemptions": ("Requests that lost their place in the batch for a while.", load.preemptions),
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", load.prefix_queries),
            "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", load.prefix_hits),
        }
        for kind, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (documentation, value) in values.items():
                family = kind(f"semiopen:{name}", documentation, labels=["model_name"])
                family.add_metric([self._model], float(value))
                yield family

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: the registry need not ask the engine to learn the names."""
        return []
