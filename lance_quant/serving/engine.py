"""The serving engine: loaded models, one worker for all of them, a bounded queue, cancellation and deadlines.

Requests of a model that computes one at a time wait in line; whoever comes when the line is full is told so at once,
and when to come back. A request whose client has left is taken out of the line, or stopped after its current step.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from lance_quant.inference.pipeline import OnStep, Pipeline, Progress, Stopped

log = logging.getLogger("lance_quant")
T = TypeVar("T")


class Busy(Exception):
    """The line is full, or the server is closing; `retry_after` is the seconds after which a place is likely free."""

    def __init__(self, retry_after: int):
        super().__init__(f"all places in line are taken: try again in {retry_after} s")
        self.retry_after = retry_after


class TookTooLong(Exception):
    """A request ran into the time limit."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may wait.

    waiting: requests in line, beside the one that runs
    seconds: that a request may run
    body_bytes: of a request's body
    pixels: of an input picture, or of a frame of an input clip
    tokens: of an answer
    pictures: per request
    frames: of a clip that is made
    steps: of denoising
    kept_bytes: of results that wait to be fetched by their URL or as a finished job; the oldest go first
    """

    waiting: int = 64
    seconds: float = 1800.0
    body_bytes: int = 64 << 20
    pixels: int = 50_000_000
    tokens: int = 4096
    pictures: int = 10
    frames: int = 121
    steps: int = 200
    kept_bytes: int = 1 << 30


@dataclass
class Job(Generic[T]):
    """A request in line, running or done; `future` has its result, `Stopped`, or what it raised."""

    model: str
    work: Callable[[Pipeline, OnStep], T]
    on_step: OnStep | None = None
    future: "Future[T]" = field(default_factory=Future)
    cancelled: threading.Event = field(default_factory=threading.Event)
    progress: Progress | None = None
    started: float | None = None  # time.monotonic


class Engine:
    """Runs jobs on loaded models, one at a time, in a thread of its own.

    Args:
        models: by the name that requests use; the first is taken where none is named.
    """

    def __init__(self, models: Mapping[str, Pipeline], limits: Limits | None = None):
        limits = limits or Limits()
        self.models, self.limits = dict(models), limits
        self._observe: Callable[[str, float, str], object] = lambda *_: None
        self.running: Job[Any] | None = None
        self._line: queue.Queue[Job[Any] | None] = queue.Queue()
        self._places = threading.Semaphore(limits.waiting + 1)
        self._taken = 0
        self._lock = threading.Lock()
        self._recent: deque[float] = deque([5.0], maxlen=20)  # seconds that jobs took
        self._open = True
        self._thread = threading.Thread(target=self._run, name="lance-worker", daemon=True)
        self._thread.start()

    @property
    def default(self) -> str:
        """The model of requests that name none."""
        return next(iter(self.models))

    def observe(self, told: Callable[[str, float, str], object]) -> None:
        """Have `told` called with (model, seconds, outcome) when a job ends: "done", "stopped", "failed" or "late"."""
        self._observe = told

    @property
    def waiting(self) -> int:
        """Jobs that are in line, the running one not counted."""
        with self._lock:
            return max(0, self._taken - (self.running is not None))

    def submit(self, model: str, work: Callable[[Pipeline, OnStep], T], on_step: OnStep | None = None) -> Job[T]:
        """Put a job in line.

        Args:
            model: a key of `models`.
            work: gets the model, and what to call after every step or token; runs in the worker's thread.
            on_step: is called after every step, in the worker's thread.

        Raises:
            Busy: all places are taken.
        """
        if not self._open or not self._places.acquire(blocking=False):
            raise Busy(self.seconds_until_free())
        with self._lock:
            self._taken += 1
        job = Job(model, work, on_step)
        self._line.put(job)
        return job

    def cancel(self, job: Job[Any]) -> None:
        """End a job: at once if it is in line, after its current step if it runs; nothing where it is done."""
        job.cancelled.set()
        with self._lock:
            if self.running is job:
                self.models[job.model].stop()

    def seconds_until_free(self) -> int:
        """About how long the next place takes, whole seconds from 1."""
        return max(1, round(sum(self._recent) / len(self._recent)))

    def close(self) -> None:
        """Stop what runs, end what waits, and take nothing more."""
        self._open = False
        self._line.put(None)
        running = self.running
        if running is not None:
            self.cancel(running)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while True:
            job = self._line.get()
            if job is None or not self._open:
                self._end_all(job)
                return
            self._do(job)
            self._places.release()

    def _end_all(self, job: "Job[Any] | None") -> None:
        while True:
            if job is not None:
                job.future.set_exception(Stopped("the server is closing"))
            try:
                job = self._line.get_nowait()
            except queue.Empty:
                return

    def _do(self, job: Job[Any]) -> None:
        with self._lock:
            self.running, job.started = job, time.monotonic()
        outcome = "stopped"
        try:
            if job.cancelled.is_set():
                raise Stopped("ended while in line")
            job.future.set_result(job.work(self.models[job.model], self._counting(job)))
            outcome = "done"
        except BaseException as error:  # a bug, too, is its request's own: the worker goes on with the next
            kinds: dict[type[BaseException], str] = {TookTooLong: "late", Stopped: "stopped"}
            outcome = kinds.get(type(error), "failed")
            job.future.set_exception(error)
        finally:
            seconds = time.monotonic() - (job.started or 0)
            with self._lock:
                self.running = None
                self._taken -= 1
                if outcome == "done":
                    self._recent.append(seconds)
            self._observe(job.model, seconds, outcome)

    def _counting(self, job: Job[Any]) -> OnStep:
        def on_step(progress: Progress) -> None:
            job.progress = progress
            if job.cancelled.is_set():
                raise Stopped("ended by its client")
            if time.monotonic() - (job.started or 0) > self.limits.seconds:
                raise TookTooLong(f"the request ran longer than {self.limits.seconds:g} s, this server's limit")
            if job.on_step is not None:
                job.on_step(progress)

        return on_step
