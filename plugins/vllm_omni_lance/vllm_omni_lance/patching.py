"""Monkey patching that can be repeated: a method is replaced once, however often it is asked for."""

import functools
from collections.abc import Callable
from typing import Any

_MARK = "_vllm_omni_lance"


def replace(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Set owner.name to make(owner.name), unless that has been done.

    Args:
        owner: a class or a module.
        make: takes the original, which may be inherited, and returns what stands for it.
    """
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return
    made = functools.wraps(original)(make(original))
    setattr(made, _MARK, True)
    setattr(owner, name, made)
