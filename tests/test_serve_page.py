"""The web page on lance-nano, in headless Chromium, at the width of a phone and of a desk.

Skipped without Gradio (requirements-serve.txt), Playwright and a Chromium; LANCE_SCREENSHOTS names a folder for
pictures of what was seen.
"""

import os
import threading
from pathlib import Path

import pytest
from browser import CHROMIUM, needs_browser
from PIL import Image

pytest.importorskip("gradio", reason="requirements-serve.txt is not installed")
pytest.importorskip("uvicorn", reason="requirements-serve.txt is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from lance_quant.serving import loading, server  # noqa: E402 - they need what was looked for

SHOTS = os.environ.get("LANCE_SCREENSHOTS")
pytestmark = needs_browser


@pytest.fixture(scope="module")
def address():
    import uvicorn

    loaded = loading.load(None, [], device="cpu")
    listener = server.listen("127.0.0.1", 0)
    with server.application(loaded, server.limits_of(8, 600, 64), None, ["127.0.0.1"], page=True) as app:
        running = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        running.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[1280, 390])
def page(request, address, chromium):
    """An open page; at its end nothing was wider than the window, no script failed, nothing was fetched elsewhere."""
    page = chromium.new_page(viewport={"width": request.param, "height": 900})
    failed, elsewhere = [], []
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.on("request", lambda asked: elsewhere.append(asked.url) if asked.url.startswith("http")
            and not asked.url.startswith(address) else None)
    page.goto(address)
    page.wait_for_selector("#draw-go")
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= request.param
    assert not failed and not elsewhere
    page.close()


def tab(page, name):
    """Open a tab; on a phone it may be behind the dots."""
    found = page.get_by_role("tab", name=name)
    if not found.count() or not found.first.is_visible():
        page.locator(".overflow-menu > button").click()
        found = page.locator(".overflow-dropdown button", has_text=name)
    found.first.click()
    page.wait_for_timeout(300)


def shot(page, name):
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"{name}_{page.viewport_size['width']}.png"), full_page=True)


def test_a_picture_is_drawn_and_kept_in_the_gallery(page):
    page.fill("#draw-prompt textarea", "a red circle")
    page.click("#draw-go")
    page.wait_for_selector("#draw-picture img", timeout=60_000)
    assert "seed 42" in page.inner_text("#draw-progress")
    shot(page, "page_draw")
    tab(page, "Gallery")
    page.wait_for_selector("#gallery img", timeout=10_000)
    assert "seed 42" in page.inner_text("#gallery")


def test_two_models_are_seen_side_by_side_with_size_time_and_difference(page):
    tab(page, "Compare")
    page.fill("#compare-prompt textarea", "a red circle and a blue square")
    page.click("#compare-go")
    page.wait_for_selector("#compare-right img", timeout=60_000)
    page.wait_for_timeout(300)
    assert "dB PSNR between them" in page.inner_text("#compare-progress")
    for side, name in (("left", "Lance_nano"), ("right", "Lance_nano-int4")):
        said = page.inner_text(f"#compare-{side}-text")
        assert name in said and "MB" in said and " s" in said
    shot(page, "page_compare")


def test_a_picture_is_asked_about(page, tmp_path):
    Image.new("RGB", (112, 112), "red").save(tmp_path / "a.png")
    tab(page, "Ask")
    page.set_input_files("#ask-picture input[type=file]", str(tmp_path / "a.png"))
    page.wait_for_selector("#ask-picture img")
    page.fill("#ask-question textarea", "What colour is it?")
    page.click("#ask-go")
    page.wait_for_function("document.querySelectorAll('#ask-chat .message').length >= 2", timeout=60_000)
    page.wait_for_timeout(1000)
    assert "What colour is it?" in page.inner_text("#ask-chat") and len(page.inner_text("#ask-chat")) > 25
    shot(page, "page_ask")


def test_a_request_is_stopped(page, address):
    page.get_by_text("Settings", exact=True).first.click()
    page.fill("#draw-prompt textarea", "a green circle")
    steps = page.get_by_label("number input for Steps").first
    steps.fill("100")
    steps.press("Tab")
    page.wait_for_timeout(500)  # the value goes to the server on its own
    page.click("#draw-go")
    page.wait_for_function("document.querySelector('#draw-progress').innerText.includes('of 100')", timeout=30_000)
    page.click("#draw-stop")
    page.wait_for_function("document.querySelector('#draw-progress').innerText.includes('stopped')", timeout=10_000)
    for _ in range(50):
        if page.request.get(f"{address}/health").json()["running"] is None:
            break
        page.wait_for_timeout(100)
    assert page.request.get(f"{address}/health").json()["running"] is None


def test_a_mistake_is_said_in_one_line(page):
    page.fill("#draw-prompt textarea", "<|video_pad|>")
    page.click("#draw-go")
    page.wait_for_function("document.body.innerText.includes('marks the place of a picture')", timeout=20_000)
