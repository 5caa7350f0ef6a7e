"""The node table as ComfyUI's V1 classes."""

from typing import Any

from . import host, models, nodes
from .table import CATEGORY, NODES, Input, Node

CHOICES = {"checkpoints": models.labels, "devices": host.device_names}


def mappings() -> tuple[dict[str, type], dict[str, str]]:
    """Node ID -> class, and node ID -> title."""
    return {node.id: _node_class(node) for node in NODES}, {node.id: node.title for node in NODES}


def _node_class(node: Node) -> type:
    body: dict[str, Any] = {
        "__doc__": node.description,
        "INPUT_TYPES": classmethod(lambda cls: input_types(node)),
        "RETURN_TYPES": tuple(_kind(output.kind) for output in node.outputs),
        "RETURN_NAMES": tuple(output.name for output in node.outputs),
        "OUTPUT_TOOLTIPS": tuple(output.tooltip for output in node.outputs),
        "OUTPUT_IS_LIST": tuple(output.is_list for output in node.outputs),
        "OUTPUT_NODE": node.is_output,
        "FUNCTION": node.run,
        "CATEGORY": CATEGORY,
        "DESCRIPTION": node.description,
        node.run: staticmethod(getattr(nodes, node.run)),
    }
    if node.run == "load_model":
        body["VALIDATE_INPUTS"] = staticmethod(nodes.validate_model)
        body["IS_CHANGED"] = staticmethod(nodes.model_fingerprint)
    if node.run == "self_check":
        body["IS_CHANGED"] = staticmethod(lambda: float("nan"))  # a report is of now
    return type(node.id, (), body)


def input_types(node: Node) -> dict[str, dict[str, tuple]]:
    """What INPUT_TYPES returns."""
    types: dict[str, dict[str, tuple]] = {"required": {}, "optional": {}}
    for entry in node.inputs:
        types["optional" if entry.optional else "required"][entry.name] = _declared(entry)
    return types if types["optional"] else {"required": types["required"]}


def _declared(entry: Input) -> tuple:
    if not entry.is_widget:
        return _kind(entry.kind), {"tooltip": entry.tooltip}
    options: dict[str, Any] = {"default": entry.default, "tooltip": entry.tooltip}
    if entry.kind in ("INT", "FLOAT"):
        options |= {"min": entry.low, "max": entry.high, "step": entry.step}
    if entry.name == "seed":
        options["control_after_generate"] = True
    if entry.kind == "STRING":
        options |= {"multiline": entry.multiline, "dynamicPrompts": entry.name in ("prompt", "instruction")}
    if entry.advanced:
        options["advanced"] = True
    if entry.kind == "COMBO":
        choices = CHOICES[entry.choices]() if isinstance(entry.choices, str) else entry.choices
        return list(choices), options
    return entry.kind, options


class _Any(str):
    """ComfyUI's wildcard type: compares unequal to no type."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


def _kind(kind: str) -> str:
    return _Any(kind) if kind == "*" else kind
