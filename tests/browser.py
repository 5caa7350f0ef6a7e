"""Pages as parsed, and in headless Chromium at the width of a phone and of a desk."""

import html
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
# The page runs in a frame of the width: headless windows have a least width of their own.
_HARNESS = """<!doctype html><body><iframe id="page" style="width:{width}px;height:3000px;border:0" srcdoc="{page}">
</iframe><script>
document.getElementById("page").onload = event => {{
  const page = event.target.contentDocument, root = page.documentElement, found = {{}};
  found.width = event.target.contentWindow.innerWidth;
  found.needed = root.scrollWidth;
  found.wide = [...page.querySelectorAll("main *")].filter(one => !one.closest(".scroll") && !one.closest("dialog")
    && !one.closest("svg") && one.getBoundingClientRect().right > {width} + 0.5).map(one => one.outerHTML.slice(0, 90));
  found.rows = [...page.querySelectorAll("thead tr")].map(row => [...row.cells].map(cell => {{
    const box = cell.getBoundingClientRect(), text = page.createRange();
    text.selectNodeContents(cell);
    return {{text: cell.textContent.trim(), overflow: text.getBoundingClientRect().right - box.right}}; }}));
  found.fonts = [...page.querySelectorAll("main *")].filter(one => one.childElementCount === 0 && one.textContent.trim()
    && !one.closest("svg")).map(one => parseFloat(event.target.contentWindow.getComputedStyle(one).fontSize));
  found.result = {probe};
  document.body.dataset.found = JSON.stringify(found);
}};
</script></body>"""


class Page(html.parser.HTMLParser):
    """What a page holds; checks that tags close in order."""

    VOID = {"meta", "line", "img", "br", "polyline"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def look(page: str, width: int, folder: Path, probe: str = "null") -> dict:
    """What a page of so many pixels' width is measured to be.

    Args:
        folder: for the harness.
        probe: JavaScript that sees the page's document as `page` and the measures so far as `found`.
    """
    harness = folder / "harness.html"
    harness.write_text(_HARNESS.format(width=width, page=html.escape(page), probe=probe), encoding="utf-8")
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile",
                           "--virtual-time-budget=5000", "--dump-dom", harness.as_uri()],
                          capture_output=True, text=True, check=True, timeout=120)
    (found,) = re.findall(r'<body data-found="([^"]*)"', done.stdout)
    return json.loads(html.unescape(found))
