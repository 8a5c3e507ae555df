"""Pages in headless Chromium: what is cut off or overlaps on a phone and on a desk, and pictures."""

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

WIDTHS = (390, 1280)  # pixels: a phone and a desk

# The page stands in a frame, whose scripts its own policy forbids; this one measures it from outside.
_MEASURE = """<!DOCTYPE html><body style="margin:0"><iframe style="border:0;height:900px"></iframe>
<script>
const frame = document.querySelector("iframe");
const GAP = 3;  // labels side by side with less between them are read as one
const meet = (a, b) =>
  a.left < b.right + GAP && b.left < a.right + GAP && a.top < b.bottom - 1 && b.top < a.bottom - 1;
const flaws = (page, width) => {
  frame.style.width = `${width}px`;
  const wide = page.documentElement.scrollWidth, found = wide > width ? [`${wide} wide`] : [];
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
  return [groups.length, found.map(flaw => `${width}: ${flaw}`)];
};
frame.onload = () => {
  const page = frame.contentDocument;
  page.querySelectorAll("details").forEach(each => each.open = true);
  const each = WIDTHS.map(width => flaws(page, width));
  document.title = JSON.stringify({groups: each[0][0], found: each.flatMap(([, found]) => found)});
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


def flaws(page: str) -> tuple[int, list[str]]:
    """How many groups of labels a page has, and what of them is cut off, overlaps or is too wide at which width."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "measure.html")
        quoted = json.dumps(page).replace("</", "<\\/").replace("<!--", "<\\!--")
        file.write_text(_MEASURE.replace("WIDTHS", str([*WIDTHS])).replace("PAGE", quoted), encoding="utf-8")
        text = _run("--dump-dom", f"--window-size={max(WIDTHS)},900", file.as_uri(), profile=folder)
        title = re.search(r"<title>(.*?)</title>", text)
        assert title, text[-2000:]
        measured = json.loads(html.unescape(title[1]))
    return measured["groups"], measured["found"]


def draw(page: str, width: int, picture: Path) -> None:
    """A PNG of a page from its top down, some twelve screens long."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "page.html")
        file.write_text(page, encoding="utf-8")
        _run(f"--screenshot={picture}", f"--window-size={width},12000", file.as_uri(), profile=folder)


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
