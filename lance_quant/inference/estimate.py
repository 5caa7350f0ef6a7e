"""Time estimate of a long run: the rate of its first steps or tokens, times all that are to come.

A denoising step with guidance is two passes of the model, one without is one; which steps are guided is known before.
An answer has so many tokens as it likes, so that its estimate is the most that it may take.
"""

import logging
import time
from collections.abc import Callable

from lance_quant.lance.generation import computed_steps, timesteps
from lance_quant.lance.settings import Settings

log = logging.getLogger("lance_quant")

FIRST = 2  # steps or tokens that are timed, behind the first one, which sets kernels and libraries up
_LONG = 60.0  # seconds from which on there is something to say


def costs_of(settings: Settings) -> list[int]:
    """Passes of the model in each computed step of a request, or 1 for each token of its longest answer."""
    if settings.spec.makes == "text":
        return [1] * settings.max_new_tokens
    times = timesteps(settings.sampling).tolist()
    return [2 if settings.sampling.guided(times[number]) else 1
            for number in sorted(computed_steps(settings.sampling))]


class Estimate:
    """Says once how long a run will take: call `begin` when a sample begins, `step` after each step or token.

    Args:
        samples: how many there are.
        costs: of each step of a sample, in any unit (costs_of).
        clock: seconds.
        wait: called before a step's end is read off the clock: a GPU works on while the host goes ahead.
    """

    def __init__(self, settings: Settings, samples: int, costs: list[int],
                 clock: Callable[[], float] = time.perf_counter, wait: Callable[[], object] = lambda: None):
        self._wait = wait
        self._settings, self._samples, self._costs, self._clock = settings, samples, costs, clock
        self._begun, self._steps, self._said = clock(), list[float](), False

    def begin(self) -> None:
        """A sample begins."""
        self._begun, self._steps = self._clock(), []

    def step(self) -> None:
        """A step of the sample, or a token of its answer, is done."""
        if self._said:
            return
        self._wait()
        self._steps.append(self._clock())
        if len(self._steps) > min(FIRST, len(self._costs) - 1):
            self._said = True
            seconds = self.seconds()
            if seconds >= _LONG:
                log.info("%s", self._text(seconds))

    def seconds(self) -> float:
        """What all samples will take: reading the request, and its steps at the rate of those that were timed."""
        done = len(self._steps)
        rate = (self._steps[-1] - self._steps[0]) / sum(self._costs[1:done]) if done > 1 else \
            (self._steps[0] - self._begun) / self._costs[0]
        reading = max(0.0, self._steps[0] - self._begun - rate * self._costs[0])
        return self._samples * (reading + rate * sum(self._costs))

    def _text(self, seconds: float) -> str:
        text = self._settings.spec.makes == "text"
        unit, most = ("tokens", "at most ") if text else ("steps", "")
        return (f"{self._settings.task}: {most}{duration(seconds)} for {self._samples} samples of {most}"
                f"{len(self._costs)} {unit}, by the first {len(self._steps)}; --limit takes fewer samples")


def duration(seconds: float) -> str:
    """Seconds for a person: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
