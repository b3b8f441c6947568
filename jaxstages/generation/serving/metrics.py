"""Metrics of the server, in the format of Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from jaxstages.generation.serving.scheduler import Scheduler

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class ServerMetrics:
    """Counters of requests and tokens, and times, each by model."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self._registry, "namespace": "jaxstages"}
        by_model = ["model"]
        self._requests = Counter("requests", "Requests by status", ["model", "status"], **options)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts", by_model, **options)
        self._cached = Counter("cached_prompt_tokens", "Tokens of prompts that were in the cache", by_model, **options)
        self._generated = Counter("generated_tokens", "Generated tokens", by_model, **options)
        self._first = Histogram("first_token_seconds", "Time to the first token", by_model, buckets=SECONDS, **options)
        self._total = Histogram("request_seconds", "Time of a request", by_model, buckets=SECONDS, **options)

        busy = Gauge("busy_slots", "Answers under way", **options)
        busy.set_function(lambda: scheduler.num_busy)
        waiting = Gauge("waiting_answers", "Answers that wait for a slot", **options)
        waiting.set_function(lambda: scheduler.num_waiting)

    def count_request(self, model: str, status: int) -> None:
        self._requests.labels(model, str(status)).inc()

    def count_tokens(self, model: str, prompt: int, cached: int, generated: int) -> None:
        self._prompt.labels(model).inc(prompt)
        self._cached.labels(model).inc(cached)
        self._generated.labels(model).inc(generated)

    def observe_first_token(self, model: str, seconds: float) -> None:
        self._first.labels(model).observe(seconds)

    def observe_request(self, model: str, seconds: float) -> None:
        self._total.labels(model).observe(seconds)

    def to_text(self) -> bytes:
        return generate_latest(self._registry)
