"""Pages in headless Chromium: what is cut off or overlaps at a width, and pictures."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

# The page stands in a frame, whose scripts its own policy forbids; this one measures it from outside.
_MEASURE = """<!DOCTYPE html><body style="margin:0"><iframe style="border:0;width:WIDTHpx;height:900px"></iframe>
<script>
const frame = document.querySelector("iframe");
const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
frame.onload = () => {
  const page = frame.contentDocument, found = [];
  page.querySelectorAll("details").forEach(each => each.open = true);
  const wide = page.documentElement.scrollWidth;
  if (wide > WIDTH) found.push(`${wide} wide`);
  const groups = [], add = (within, texts) => groups.push([within.getBoundingClientRect(), texts]);
  page.querySelectorAll("svg.chart").forEach(svg => add(svg, svg.querySelectorAll("text")));
  page.querySelectorAll(".axis, .labels").forEach(each => add(page.body, each.children));
  for (const [box, texts] of groups) {
    const boxes = [...texts].map(text => [text.textContent, text.getBoundingClientRect()]);
    boxes.forEach(([name, own], index) => {
      if (own.left < box.left - 1 || own.right > box.right + 1 || own.top < box.top - 1 || own.bottom > box.bottom + 1)
        found.push(`${name} is cut off`);
      boxes.slice(index + 1).forEach(([other, its]) => { if (meet(own, its)) found.push(`${name} on ${other}`); });
    });
  }
  document.title = JSON.stringify({texts: groups.length, found});
};
frame.srcdoc = PAGE;
</script>"""


def chromium() -> str:
    """Its program; where there is none a test is skipped, or fails if REQUIRE_CHROMIUM is set."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if program := shutil.which(name):
            return program
    if os.environ.get("REQUIRE_CHROMIUM"):
        pytest.fail("there is no Chromium: `apt-get install chromium`, or unset REQUIRE_CHROMIUM to go without")
    pytest.skip("there is no Chromium")


def flaws(page: str, width: int) -> tuple[int, list[str]]:
    """How many groups of labels a page has, and what of them is cut off, overlaps or is too wide."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "measure.html")
        quoted = json.dumps(page).replace("</", "<\\/").replace("<!--", "<\\!--")
        file.write_text(_MEASURE.replace("WIDTH", str(width)).replace("PAGE", quoted), encoding="utf-8")
        text = _run("--dump-dom", f"--window-size={max(width, 500)},900", file.as_uri(), profile=folder)
        title = re.search(r"<title>(.*?)</title>", text)
        assert title, text[-2000:]
        measured = json.loads(html.unescape(title[1]))
    return measured["texts"], measured["found"]


def _run(*options: str, profile: str) -> str:
    own = (
        "--headless",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=9000",
    )
    root = ("--no-sandbox",) if hasattr(os, "geteuid") and os.geteuid() == 0 else ()  # where its sandbox cannot be
    run = [chromium(), *own, *root, *options]
    return subprocess.run(run, check=True, capture_output=True, text=True, timeout=120).stdout
