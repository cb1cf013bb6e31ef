"""The numbers of a server for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dream_jax.serving.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class ServerMetrics:
    """Counts requests and measures their times; the numbers of the engine are read when they are asked for.

    Args:
      engine: the engine of the server.

    Attributes:
      requests: number of requests, by path and status.
      first: seconds from a request to the first text that can change no more.
      last: seconds from a request to its end.
    """

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineNumbers(engine))
        self.requests = Counter("dream_requests", "Requests.", ["path", "status"], registry=self._registry)
        self.first = Histogram(
            "dream_first_text_seconds",
            "Seconds from a streamed request to its first text.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.last = Histogram(
            "dream_answer_seconds",
            "Seconds from a request to the end of its last answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """Returns all numbers in the text format of Prometheus."""
        return generate_latest(self._registry)


class _EngineNumbers(Collector):
    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        """Yields the numbers of the engine."""
        counts, settings = self._engine.counts, self._engine.settings
        yield GaugeMetricFamily("dream_waiting", "Answers that wait for a row.", counts.waiting)
        yield GaugeMetricFamily("dream_busy_rows", "Rows that are being denoised.", counts.busy_rows)
        yield GaugeMetricFamily("dream_batches", "Batches that take turns.", counts.batches)
        yield GaugeMetricFamily("dream_rows_per_batch", "Rows of a full batch.", settings.rows)
        yield GaugeMetricFamily("dream_programs", "Families of compiled programs.", self._engine.num_families)
        yield CounterMetricFamily("dream_forwards", "Forward passes.", counts.forwards)
        tokens = CounterMetricFamily("dream_tokens", "Tokens of started prompts and finished answers.", labels=["kind"])
        tokens.add_metric(["prompt"], counts.prompt_tokens)
        tokens.add_metric(["answer"], counts.answer_tokens)
        yield tokens
        answers = CounterMetricFamily("dream_answers", "Answers, by how they ended.", labels=["end"])
        for end in ("finished", "cancelled", "failed"):
            answers.add_metric([end], getattr(counts, end))
        yield answers
