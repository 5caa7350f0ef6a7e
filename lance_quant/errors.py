"""The one exception for the user's mistakes, and the checks of numbers that raise it.

A message names the value, the rule it breaks and what to do next, in one line. `cli.run` prints it and exits with
code 2; every other exception is a bug and keeps its traceback.
"""

import math
from numbers import Integral, Real


class InputError(ValueError):
    """Input that cannot be used: a path, a file's content, a flag, a combination of them."""


def require_whole(name: str, value: object, lowest: int, highest: int = 2**63 - 1) -> int:
    """`value` as an int, if it is a whole number from `lowest` to `highest`.

    Raises:
        InputError: it is not; bool is no number.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{name} {value!r} must be a whole number")
    number = int(value)
    if not lowest <= number <= highest:
        upper = "below 2**63" if highest == 2**63 - 1 else f"at most {highest}"
        raise InputError(f"{name} {number} must be at least {lowest} and {upper}")
    return number


def require_real(name: str, value: object, lowest: float, highest: float = 2.0**63) -> float:
    """`value` as a float, if it is a number from `lowest` to `highest`.

    Raises:
        InputError: it is not; NaN, infinity and bool are no numbers.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{name} {value!r} must be a number")
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond any float
        number = math.inf
    if not (lowest <= number <= highest and math.isfinite(number)):
        upper = "finite" if highest == 2.0**63 else f"at most {highest:g}"
        raise InputError(f"{name} {number} must be at least {lowest:g} and {upper}")
    return number


def require_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise InputError unless `value` is one of the words `allowed`."""
    if value not in allowed:
        raise InputError(f"{name} {value!r} must be one of {', '.join(allowed)}")
