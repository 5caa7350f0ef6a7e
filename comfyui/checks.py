"""Inputs of a node, checked against the table before it runs.

ComfyUI holds widgets to their ranges in the browser, and what its HTTP API or a link brings only in part: a NaN passes,
and so do a picture of integers and a length between two steps.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from . import host
from .table import NODES, Input, Node
from .toolkit import PackError

_BY_RUN = {node.run: node for node in NODES}
_CUSTOM = ("width", "height")  # widgets that count for size custom alone


def of(run: Callable[..., Any]) -> Callable[..., None]:
    """What checks the arguments of a node's function."""
    signature, node = inspect.signature(run), _BY_RUN[run.__name__]

    def check(*args: Any, **inputs: Any) -> None:
        given = signature.bind(*args, **inputs).arguments
        require(node, given | given.get("extra", {}))

    return check


def require(node: Node, given: Mapping[str, Any]) -> None:
    """Raise PackError for the first input that cannot be what the table says."""
    for entry in node.inputs:
        if entry.name not in given or (given[entry.name] is None and entry.optional):
            continue
        if entry.name in _CUSTOM and given.get("size") != "custom":
            continue
        problem = _KINDS[entry.kind](entry, given[entry.name])
        if problem:
            raise PackError(f"{node.title}: {entry.label} {_shown(given[entry.name])} {problem}.")
    if "cfg_start" in given and given["cfg_start"] >= given["cfg_end"] and given["cfg"] != 1:
        raise PackError(f"{node.title}: guidance from t {given['cfg_start']} must be below guidance up to t "
                        f"{given['cfg_end']}, or no step is guided. To turn guidance off, set guidance (cfg) to 1.")


def _shown(value: Any) -> str:
    if hasattr(value, "shape"):
        return f"of {value.dtype} {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _integer(entry: Input, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
        return "must be a whole number"
    assert entry.low is not None and entry.high is not None and entry.step is not None
    low, high, step = int(entry.low), int(entry.high), int(entry.step)
    if not low <= value <= high:
        return f"must be from {low} to {high}"
    below = value - (value - low) % step
    if value == below:
        return ""
    near = " or ".join(str(count) for count in (below, below + step) if count <= high)
    return f"must be {low} plus a multiple of {step}: take {near}"


def _number(entry: Input, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "must be a number"
    assert entry.low is not None and entry.high is not None
    return "" if math.isfinite(value) and entry.low <= value <= entry.high else \
        f"must be from {entry.low:g} to {entry.high:g}"


def _choice(entry: Input, value: Any) -> str:
    known = host.device_names() if entry.choices == "devices" else entry.choices
    if isinstance(known, str) or value in known:  # checkpoints: models.choose says more of them
        return "" if isinstance(value, str) else "must be a text"
    return f"is none of {', '.join(known)}"


def _image(_: Input, value: Any) -> str:
    import torch

    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return "must be an IMAGE, floating-point numbers from 0 to 1: connect the output of Load Image or the like"
    if value.dim() != 4 or value.shape[-1] not in (3, 4) or 0 in value.shape:
        return "must have the axes picture, height, width and 3 or 4 colours, none of them empty"
    return "" if torch.isfinite(value).all() else "holds NaN or infinite numbers: what made it went wrong"


def _video(_: Input, value: Any) -> str:
    return "" if hasattr(value, "get_components") else "is no VIDEO: connect Load Video or the like"


def _model(_: Input, value: Any) -> str:
    from .handle import LanceModel

    return "" if isinstance(value, LanceModel) else "is no Lance model: connect Lance Model Loader"


_KINDS: dict[str, Callable[[Input, Any], str]] = {
    "INT": _integer, "FLOAT": _number, "COMBO": _choice, "IMAGE": _image, "VIDEO": _video, "LANCE_MODEL": _model,
    "BOOLEAN": lambda _, value: "" if isinstance(value, bool) else "must be true or false",
    "STRING": lambda _, value: "" if isinstance(value, str) else "must be a text", "*": lambda *_: ""}
