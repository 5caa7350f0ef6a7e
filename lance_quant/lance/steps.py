"""Eager execution of the steps that recur, one per decoded token or denoising step, and what stands in its place.

`Lance.steps` is a `Steps`; compiled.compile_steps puts a `CompiledSteps` there. The loops ask it for what they run, and
know nothing of compilers and graphs.
"""

import contextlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar


class LayerParts(NamedTuple):
    """What lies before and after the attention of one decoder layer, in the form that is called (mot.DecoderLayer)."""

    before: Callable[..., Any]
    after: Callable[..., Any]


class Recurring(Protocol):
    """Something whose `step` does the same work on the same memory every time."""

    def step(self) -> None:
        """Do the next step."""
        ...


Loop = TypeVar("Loop", bound=Recurring)


class Steps:
    """Steps run as they are written.

    layers: per decoder layer, what recurring calls run in the place of its `before` and `after`; None: those.
    seconds: what the first step of each kind took, where that compiles; None: nothing is compiled.
    """

    layers: Sequence[LayerParts] | None = None
    seconds: dict[str, float] | None = None

    def first(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Around a step; `what` names its kind."""
        return contextlib.nullcontext()

    def loop(self, make: Callable[[int, int], Loop], room: int, longest: int,
             kind: Hashable) -> tuple[Loop, Callable[[], None]]:
        """A decoding loop with room for a request, and what to call for each of its steps.

        Args:
            make: makes a loop of a capacity and a longest answer, both in tokens.
            room: tokens of prompt and answer.
            longest: tokens of the answer.
            kind: what else the loop depends on.
        """
        made = make(room, longest)
        return made, made.step
