"""The ComfyUI pack in a real ComfyUI server, on the CPU, through its HTTP API.

    COMFYUI_PATH=~/ComfyUI COMFYUI_PYTHON=~/ComfyUI/venv/bin/python python -m pytest tests/test_comfyui_server.py

The pack is installed as a user installs it, into a base directory of its own: the ComfyUI at COMFYUI_PATH stays as it
is. COMFYUI_PYTHON, by default this Python, must have ComfyUI's requirements and diffusers. The tests in a browser also
need playwright in this Python, and a Chromium.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import GOLDENS
from PIL import Image

from comfyui import install, table, toolkit

COMFYUI = os.environ.get("COMFYUI_PATH")
pytestmark = pytest.mark.skipif(not COMFYUI, reason="needs a ComfyUI checkout: set COMFYUI_PATH (and COMFYUI_PYTHON)")
WORKFLOWS = sorted((Path(__file__).parent.parent / "comfyui" / "example_workflows").glob("*.json"))
_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")


class Server:
    """A running ComfyUI."""

    def __init__(self, base: Path, port: int):
        self.base, self.url = base, f"http://127.0.0.1:{port}"

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self.url + path, timeout=60) as reply:
            return json.loads(reply.read())

    def text(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as reply:
            return reply.read().decode()

    def post(self, path: str, content: dict) -> dict:
        request = urllib.request.Request(self.url + path, json.dumps(content).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.loads(reply.read() or b"{}")
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def queue(self, graph: dict) -> str:
        return self.post("/prompt", {"prompt": graph})["prompt_id"]

    def wait(self, prompt: str, seconds: float = 300) -> dict:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = self.get(f"/history/{prompt}")
            if history:
                return history[prompt]
            time.sleep(0.02)
        raise AssertionError(f"not finished in {seconds} s")

    def run(self, graph: dict) -> dict:
        done = self.wait(self.queue(graph))
        assert done["status"]["status_str"] == "success", done["status"]["messages"][-1]
        return done

    def messages(self, done: dict) -> dict[str, dict]:
        return {kind: content for kind, content in done["status"]["messages"]}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Server:
    """The pack installed by its installer; lance-nano, or the golden checkpoint where that is not trained yet."""
    base = tmp_path_factory.mktemp("comfyui")
    for folder in ("custom_nodes", "input", "models/lance"):
        (base / folder).mkdir(parents=True)
    install.main(["--comfyui_path", str(base)])
    if toolkit.nano() is None:
        shutil.copytree(GOLDENS / "checkpoint", base / "models" / "lance", dirs_exist_ok=True)
    Image.new("RGB", (320, 240), "orange").save(base / "input" / "example.png")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), "main.py", "--cpu", "--listen", "127.0.0.1", "--port",
               str(port), "--disable-api-nodes", "--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
    log = base / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=COMFYUI, stdout=output, stderr=subprocess.STDOUT)
    running = Server(base, port)
    try:
        _wait_until_up(running, process, log)
        yield running
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_until_up(server: Server, process: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text("utf-8", "replace")[-3000:]
        try:
            server.get("/system_stats")
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError("ComfyUI did not come up: " + log.read_text("utf-8", "replace")[-3000:])


@pytest.fixture(scope="module")
def info(server) -> dict:
    return server.get("/object_info")


def as_prompt(workflow: dict, info: dict) -> dict:
    """An editor's workflow as the API takes it, which the editor does when a workflow is queued."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        declared = info[node["type"]]["input"]
        values, inputs = iter(node["widgets_values"]), {}
        for name, (kind, *options) in (declared.get("required", {}) | declared.get("optional", {})).items():
            if isinstance(kind, list) or kind in _WIDGETS:
                value = next(values, None)
                if value is not None:
                    inputs[name] = value
                if options and options[0].get("control_after_generate"):
                    next(values)
        inputs |= {entry["name"]: sources[entry["link"]] for entry in node["inputs"] if entry["link"]}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def drawing(info: dict, **widgets: object) -> dict:
    """Loader, Text to Image, and a preview."""
    def node(kind: str, **inputs: object) -> dict:
        defaults = {name: declared[1]["default"] for name, declared in info[kind]["input"]["required"].items()
                    if "default" in declared[1]}
        return {"class_type": kind, "inputs": defaults | inputs}

    return {"1": node("LanceKitModelLoader"),
            "2": node("LanceKitTextToImage", model=["1", 0], **{"steps": 4} | widgets),
            "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}}}


def test_all_nodes_are_registered_as_the_table_says(info):
    for node in table.NODES:
        shown = info[node.id]
        names = [*shown["input"].get("required", {}), *shown["input"].get("optional", {})]
        assert sorted(names) == sorted(entry.name for entry in node.inputs)
        assert shown["output"] == [output.kind for output in node.outputs]
        assert (shown["display_name"], shown["category"]) == (node.title, "Lance")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_example_workflow_runs(server, info, path):
    done = server.run(as_prompt(json.loads(path.read_text("utf-8")), info))
    assert done["outputs"]
    for output in done["outputs"].values():
        for file in output.get("images", []):
            assert (server.base / {"output": "output", "temp": "temp"}[file["type"]] / file["subfolder"]
                    / file["filename"]).stat().st_size > 100


def test_a_second_run_is_cached_and_another_seed_is_not(server, info):
    server.run(drawing(info, seed=1))
    again = server.messages(server.run(drawing(info, seed=1)))
    assert set(again["execution_cached"]["nodes"]) == {"1", "2", "3"}
    other = server.messages(server.run(drawing(info, seed=2)))
    assert other["execution_cached"]["nodes"] == ["1"]


def test_cancel_takes_effect_within_half_a_second(server, info):
    prompt = server.queue(drawing(info, steps=100, size="custom", width=512, height=512, seed=3))
    while not server.get("/queue")["queue_running"]:
        time.sleep(0.02)
    time.sleep(2)
    pressed = time.time()
    server.post("/interrupt", {})
    messages = server.messages(server.wait(prompt, 30))
    assert messages["execution_interrupted"]["timestamp"] / 1000 - pressed < 0.5
    server.run(drawing(info, seed=4))


def test_an_error_is_told_in_its_first_line(server, info):
    messages = server.messages(server.wait(server.queue(drawing(info, prompt=" "))))
    assert messages["execution_error"]["exception_message"].startswith("The prompt is empty.")


def test_a_missing_model_is_refused_before_anything_runs(server, info):
    graph = drawing(info)
    graph["1"]["inputs"]["flavor"] = "Lance_3B"
    refused = server.post("/prompt", {"prompt": graph})
    assert "hf download" in refused["node_errors"]["1"]["errors"][0]["details"]


def test_values_out_of_range_are_refused(server, info):
    refused = server.post("/prompt", {"prompt": drawing(info, steps=0)})
    assert refused["node_errors"]["2"]["errors"][0]["type"] == "value_smaller_than_min"


def test_free_unloads_and_the_next_run_loads_again(server, info):
    server.run(drawing(info, seed=5))
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)
    messages = server.messages(server.run(drawing(info, seed=5)))
    assert messages["execution_cached"]["nodes"] == []
    server.post("/free", {"unload_models": True})
    time.sleep(2)
    assert server.messages(server.run(drawing(info, seed=6)))["execution_cached"]["nodes"] == ["1"]


def test_help_locales_and_examples_reach_the_editor(server):
    assert server.text("/extensions/lance-quant/docs/LanceKitTextToImage/en.md").startswith("# Lance Text to Image")
    assert server.get("/i18n")["zh"]["nodeDefs"]["LanceKitUnload"]["display_name"] == "Lance 卸载"
    assert set(server.get("/workflow_templates")["lance-quant"]) == {path.stem for path in WORKFLOWS}


def test_the_self_check_finds_everything(server, info):
    graph = {"1": {"class_type": "LanceKitSelfCheck", "inputs": {}},
             "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}}
    (report,) = server.run(graph)["outputs"]["2"]["text"]
    assert "FAILED" not in report and "auto would load" in report


@pytest.fixture(scope="module")
def editor(server):
    """ComfyUI's editor in a headless browser that reaches nothing but the server."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium or google-chrome")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[
            "--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"])
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_function("() => !!(window.app && window.app.graph && window.LiteGraph && "
                               "window.LiteGraph.registered_node_types['LanceKitUnload'])", timeout=90_000)
        yield page
        browser.close()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_editor_shows_every_example_as_it_was_saved(editor, info, path):
    """Widget values shift by one, and nodes turn red, where a workflow has fewer values than the editor widgets."""
    saved = json.loads(path.read_text("utf-8"))
    editor.evaluate("(workflow) => window.app.loadGraphData(workflow)", saved)
    shown = {node["id"]: node for node in editor.evaluate("() => window.app.graph.serialize()")["nodes"]}
    ours = [node for node in saved["nodes"] if node["type"].startswith("LanceKit")]
    assert ours and len(shown) == len(saved["nodes"])
    for node in ours:
        assert shown[node["id"]].get("widgets_values", []) == node["widgets_values"]
    queued = editor.evaluate("async () => (await window.app.graphToPrompt()).output")
    expected = as_prompt(saved, info)
    for node in ours:
        assert queued[str(node["id"])]["inputs"] == expected[str(node["id"])]["inputs"]
