"""What Prometheus reads at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qft.serve.turns import Turns

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Of one server."""

    def __init__(self, turns: Turns) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._counter("qft_requests", "Requests by path and status.", "path", "status")
        self.tokens = self._counter("qft_tokens", "Tokens read (prompt) and written (answer).", "kind")
        self.seconds = self._histogram("qft_request_seconds", "Seconds from a request to the end of its answer.")
        self.first_piece = self._histogram(
            "qft_first_piece_seconds", "Seconds from an answer's turn to its first piece."
        )
        for name, text in (("working", "Answers in work."), ("waiting", "Answers that wait.")):
            gauge = Gauge(f"qft_answers_{name}", text, registry=self._registry)
            gauge.set_function(lambda name=name: getattr(turns, name))  # type: ignore[misc]

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_SECONDS, registry=self._registry)

    def text(self) -> bytes:
        """In Prometheus' text form."""
        return generate_latest(self._registry)
