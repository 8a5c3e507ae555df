"""The page of a large report: its size, and how long it takes to write it and to draw it in Chromium.

    python benchmarks/report.py [--runs 5]

The report is the one that tests make up, of 62 layers of 256 experts. Seconds are the median of some runs; those of
drawing are what a picture of the whole page takes longer than one of an empty page.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from moecast.reports.page import page

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from chromium import WIDTHS, draw
from reported import large_report

EMPTY = "<!DOCTYPE html><title>empty</title>"


def seconds(work: Callable[[], object], runs: int) -> float:
    """After one run that is not counted, which loads what all others find loaded."""
    taken = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return median(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    report = large_report()
    text = page(report)
    print(f"size: {len(text.encode()) / 1e6:.2f} MB")
    print(f"writing: {seconds(partial(page, report), runs):.2f} s")
    with TemporaryDirectory() as folder:
        picture = Path(folder, "page.png")
        for width in WIDTHS:
            empty, full = (seconds(partial(draw, shown, width, picture), runs) for shown in (EMPTY, text))
            print(f"drawing, {width} wide: {full - empty:.2f} s")


if __name__ == "__main__":
    main()
