"""What the API's routes share: engine, results, metrics, waiting for a job, and errors as OpenAI's clients expect."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lance_quant.inference.pipeline import OnStep, Pipeline
from lance_quant.serving.engine import Busy, Engine, Job, Limits
from lance_quant.serving.results import Results, VideoJob

T = TypeVar("T")
LEFT = 0.1  # seconds between looks whether the client is still there


class Metrics:
    """Prometheus metrics of one engine, in a registry of their own: requests by outcome, their seconds, who waits."""

    MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self._jobs = Counter("lance_requests", "Requests that the worker ended", ["model", "outcome"],
                             registry=self._registry)
        self._seconds = Histogram("lance_request_seconds", "Seconds that requests ran, waiting not counted", ["model"],
                                  buckets=(0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800), registry=self._registry)
        waiting = Gauge("lance_waiting_requests", "Requests in line", registry=self._registry)
        waiting.set_function(lambda: engine.waiting)
        running = Gauge("lance_running_requests", "1 while a request runs", registry=self._registry)
        running.set_function(lambda: float(engine.running is not None))

    def job(self, model: str, seconds: float, outcome: str) -> None:
        """Count a job that ended, see Engine."""
        self._jobs.labels(model, outcome).inc()
        self._seconds.labels(model).observe(seconds)

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self._registry)


class ApiError(Exception):
    """An error as OpenAI's clients expect it."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None,
                 code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Service:
    """What the routes share.

    sizes: of pictures for which a request names none, by model: Pipeline arguments height and width
    presets: of input pictures for which a request names none, by model
    """

    engine: Engine
    limits: Limits
    metrics: Metrics
    results: Results
    videos: dict[str, VideoJob]
    sizes: dict[str, dict[str, Any]]
    presets: dict[str, str]

    def model(self, name: str) -> str:
        """A loaded model's name; the default where none is given."""
        if not name:
            return self.engine.default
        if name not in self.engine.models:
            raise ApiError(404, f"the model {name!r} is not loaded; loaded: {', '.join(self.engine.models)}",
                           param="model", code="model_not_found")
        return name

    def submit(self, model: str, work: Callable[[Pipeline, OnStep], T], on_step: OnStep | None = None) -> Job[T]:
        """Put work in line, or answer 429 with when to come back."""
        try:
            return self.engine.submit(model, work, on_step)
        except Busy as error:
            raise ApiError(429, str(error), "rate_limit_error", code="queue_full",
                           headers={"Retry-After": str(error.retry_after)}) from None

    async def result(self, request: Request, job: Job[T]) -> T:
        """What a job gives; it is ended if the client leaves first."""
        done = asyncio.wrap_future(job.future)
        try:
            while not done.done():
                await asyncio.wait([done], timeout=LEFT)
                if not done.done() and await request.is_disconnected():
                    self.engine.cancel(job)
                    raise ApiError(499, "the client left")
            return done.result()
        except asyncio.CancelledError:
            self.engine.cancel(job)
            raise

    def preset(self, model: str, asked: str) -> str:
        """The resolution preset of an input picture or clip."""
        return asked or self.presets.get(model, "")
