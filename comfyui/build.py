"""Make what follows from the node table: locales, help pages and example workflows.

    python -m comfyui.build

Reads   comfyui/table.py, comfyui/chinese.py
Writes  comfyui/locales/*/nodeDefs.json, comfyui/web/docs/*/{en,zh}.md, comfyui/example_workflows/*.json
Needs   nothing but Python
Next    the tests hold the files equal to what this makes
"""

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import chinese
from .table import NODES, Input, Node

FOLDER = Path(__file__).resolve().parent
_ENGLISH = {"input": "Input", "output": "Output", "type": "Type", "default": "Default", "range": "Range",
            "meaning": "Meaning", "required": "required"}
_BY_ID = {node.id: node for node in NODES}


def files() -> dict[Path, str]:
    """Everything that is made, by path."""
    made = {FOLDER / "locales" / "en" / "nodeDefs.json": _dumped(english()),
            FOLDER / "locales" / "zh" / "nodeDefs.json": _dumped(translated())}
    for node in NODES:
        docs = FOLDER / "web" / "docs" / node.id
        made[docs / "en.md"] = _page(node, english()[node.id], node.help, _ENGLISH)
        made[docs / "zh.md"] = _page(node, translated()[node.id], chinese.HELP[node.id], chinese.WORDS)
    for name, steps in WORKFLOWS.items():
        made[FOLDER / "example_workflows" / f"{name}.json"] = _dumped(workflow(name, steps))
    return made


def english() -> dict[str, dict]:
    """The English nodeDefs."""
    return {node.id: {
        "display_name": node.title, "description": node.description,
        "inputs": {entry.name: {"name": entry.label, "tooltip": entry.tooltip} for entry in node.inputs},
        "outputs": {str(index): {"name": output.name, "tooltip": output.tooltip}
                    for index, output in enumerate(node.outputs)}} for node in NODES}


def translated() -> dict[str, dict]:
    """The Chinese nodeDefs."""
    made = {}
    for node in NODES:
        words = chinese.INPUTS | chinese.NODE_INPUTS.get(node.id, {})
        title, description = chinese.TITLES[node.id]
        made[node.id] = {
            "display_name": title, "description": description,
            "inputs": {entry.name: dict(zip(("name", "tooltip"), words[entry.name], strict=True))
                       for entry in node.inputs},
            "outputs": {str(index): dict(zip(("name", "tooltip"), chinese.OUTPUTS[output.name], strict=True))
                        for index, output in enumerate(node.outputs)}}
    return made


def _page(node: Node, words: dict, prose: str, headings: dict[str, str]) -> str:
    lines = [f"# {words['display_name']}", "", words["description"], "", prose, ""]
    if node.inputs:
        columns = [headings[word] for word in ("input", "type", "default", "range", "meaning")]
        lines += [f"| {' | '.join(columns)} |", "|---|---|---|---|---|"]
        lines += [f"| {entry.name} | {entry.kind} | {_default(entry, headings)} | {_range(entry)} | "
                  f"{words['inputs'][entry.name]['tooltip']} |" for entry in node.inputs]
        lines.append("")
    columns = [headings[word] for word in ("output", "type", "meaning")]
    lines += [f"| {' | '.join(columns)} |", "|---|---|---|"]
    lines += [f"| {output.name} | {output.kind} | {words['outputs'][str(index)]['tooltip']} |"
              for index, output in enumerate(node.outputs)]
    return "\n".join(lines) + "\n"


def _default(entry: Input, headings: dict[str, str]) -> str:
    if not entry.is_widget:
        return "" if entry.optional else headings["required"]
    return f"`{entry.default}`"


def _range(entry: Input) -> str:
    if entry.kind in ("INT", "FLOAT"):
        return f"{entry.low} – {entry.high}"
    return ", ".join(entry.choices) if isinstance(entry.choices, tuple) else ""


@dataclass(frozen=True)
class Step:
    """A node of a workflow: its links (input name -> (step, output slot)), and widgets that differ from the default."""

    type: str
    links: dict[str, tuple[str, int]]
    widgets: dict[str, object]


def _step(kind: str, links: dict[str, tuple[str, int]] | None = None, **widgets: object) -> Step:
    return Step(kind, links or {}, widgets)


# ComfyUI's own nodes in the examples: sockets, widget values, outputs.
_CORE = {
    "LoadImage": ((), ("example.png", "image"), (("IMAGE", "IMAGE"), ("MASK", "MASK"))),
    "PreviewImage": ((("images", "IMAGE"),), (), ()),
    "PreviewAny": ((("source", "*"),), (), (("STRING", "STRING"),)),
    "SaveVideo": ((("video", "VIDEO"),), ("video/lance", "auto", "auto"), ()),
}
_LOADER = {"model": ("loader", 0)}
_PICTURE, _PHOTO, _MODEL = ("draw", 0), ("photo", 0), _step("LanceKitModelLoader")
_DRAW = _step("LanceKitTextToImage", _LOADER)
_FILM = _step("LanceKitTextToVideo", _LOADER, frames=13)
_ASK = {"loader": _MODEL, "photo": _step("LoadImage"),
        "ask": _step("LanceKitImageUnderstanding", _LOADER | {"image": _PHOTO})}

WORKFLOWS: dict[str, dict[str, Step]] = {
    "lance_text_to_image": {"loader": _MODEL, "draw": _DRAW, "show": _step("PreviewImage", {"images": _PICTURE})},
    "lance_image_understanding": _ASK | {"show": _step("PreviewAny", {"source": ("ask", 0)})},
    "lance_draw_and_describe": {
        "loader": _MODEL, "draw": _DRAW, "ask": _step("LanceKitImageUnderstanding", _LOADER | {"image": _PICTURE}),
        "picture": _step("PreviewImage", {"images": _PICTURE}), "show": _step("PreviewAny", {"source": ("ask", 0)})},
    "lance_describe_and_redraw": _ASK | {
        "draw": _step("LanceKitTextToImage", _LOADER | {"prompt": ("ask", 0)}),
        "text": _step("PreviewAny", {"source": ("ask", 0)}), "show": _step("PreviewImage", {"images": _PICTURE})},
    "lance_image_edit": {
        "loader": _MODEL, "draw": _DRAW, "edit": _step("LanceKitImageEdit", _LOADER | {"image": _PICTURE}),
        "before": _step("PreviewImage", {"images": _PICTURE}), "show": _step("PreviewImage", {"images": ("edit", 0)})},
    "lance_text_to_video": {"loader": _MODEL, "film": _FILM, "save": _step("SaveVideo", {"video": ("film", 0)})},
    "lance_image_to_video": {
        "loader": _MODEL, "photo": _step("LoadImage"),
        "film": _step("LanceKitImageToVideo", _LOADER | {"image": _PHOTO}, frames=13),
        "save": _step("SaveVideo", {"video": ("film", 0)})},
    "lance_video_edit": {
        "loader": _MODEL, "film": _FILM, "edit": _step("LanceKitVideoEdit", _LOADER | {"video": ("film", 0)}),
        "save": _step("SaveVideo", {"video": ("edit", 0)})},
    "lance_video_understanding": {
        "loader": _MODEL, "film": _FILM, "ask": _step("LanceKitVideoUnderstanding", _LOADER | {"video": ("film", 0)}),
        "show": _step("PreviewAny", {"source": ("ask", 0)})},
    "lance_unload": {
        "loader": _MODEL, "draw": _DRAW, "free": _step("LanceKitUnload", _LOADER | {"after": _PICTURE}),
        "show": _step("PreviewImage", {"images": ("free", 0)})},
    "lance_self_check": {"check": _step("LanceKitSelfCheck"), "show": _step("PreviewAny", {"source": ("check", 0)})},
}


def workflow(name: str, steps: dict[str, Step]) -> dict:
    """A workflow as the editor saves it."""
    numbers = {step: index for index, step in enumerate(steps, 1)}
    links = [(index, source, slot, target, socket) for index, (source, slot, target, socket)
             in enumerate(_links(steps), 1)]
    nodes = [_placed(steps, step, numbers, links) for step in steps]
    kinds = {step: _outputs(steps[step].type) for step in steps}
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"lance-quant/{name}")), "revision": 0,
        "last_node_id": len(nodes), "last_link_id": len(links), "nodes": nodes,
        "links": [[index, numbers[source], slot, numbers[target], _slot(steps[target], socket), kinds[source][slot][1]]
                  for index, source, slot, target, socket in links],
        "groups": [], "config": {}, "extra": {}, "version": 0.4}


def _links(steps: dict[str, Step]) -> Iterator[tuple[str, int, str, str]]:
    for target, step in steps.items():
        for socket, (source, slot) in step.links.items():
            yield source, slot, target, socket


def _sockets(step: Step) -> list[tuple[str, str]]:
    """Name and type of a node's sockets, and of the widgets that a link feeds."""
    if step.type in _CORE:
        return list(_CORE[step.type][0])
    return [(entry.name, entry.kind) for entry in _BY_ID[step.type].inputs
            if not entry.is_widget or entry.name in step.links]


def _slot(step: Step, socket: str) -> int:
    return [name for name, _ in _sockets(step)].index(socket)


def _outputs(kind: str) -> list[tuple[str, str]]:
    if kind in _CORE:
        return list(_CORE[kind][2])
    return [(output.name, output.kind) for output in _BY_ID[kind].outputs]


def _values(step: Step) -> list[object]:
    """Widget values in order; the editor puts what happens after a run behind every seed."""
    if step.type in _CORE:
        return list(_CORE[step.type][1])
    values: list[object] = []
    for entry in _BY_ID[step.type].widgets:
        values += [step.widgets.get(entry.name, entry.default), *(["fixed"] if entry.name == "seed" else [])]
    return values


def _placed(steps: dict[str, Step], name: str, numbers: dict[str, int], links: list[tuple]) -> dict:
    """One node, in a column behind everything it depends on."""
    step = steps[name]
    depth = _depth(steps, name)
    row = [other for other in steps if _depth(steps, other) == depth].index(name)
    by_socket = {socket: index for index, _, _, target, socket in links if target == name}
    widgets = set() if step.type in _CORE else {entry.name for entry in _BY_ID[step.type].widgets}
    return {
        "id": numbers[name], "type": step.type, "pos": [40 + 440 * depth, 60 + 420 * row], "size": [400, 360],
        "flags": {}, "order": numbers[name] - 1, "mode": 0,
        "inputs": [{"name": socket, "type": kind, "link": by_socket.get(socket)}
                   | ({"widget": {"name": socket}} if socket in widgets else {}) for socket, kind in _sockets(step)],
        "outputs": [{"name": output, "type": kind,
                     "links": [index for index, source, at, _, _ in links if (source, at) == (name, slot)]}
                    for slot, (output, kind) in enumerate(_outputs(step.type))],
        "properties": {"Node name for S&R": step.type}, "widgets_values": _values(step)}


def _depth(steps: dict[str, Step], name: str) -> int:
    return max((1 + _depth(steps, source) for source, _ in steps[name].links.values()), default=0)


def _dumped(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write all files."""
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
