"""What the files of one conversion look like, one alone or several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..reports.gather import candidates_of
from .candidates import print_candidates
from .console import human_bytes, print_columns, print_json
from .report import conversion_as_json, run_line, serving_of, show_conversion, show_problems
from .terminal import printable

if TYPE_CHECKING:
    from ..convert.conversion import Conversion
    from ..quant.planning.fit import Machine


def show_conversions(results: Sequence[Conversion], as_json: bool, machine: Machine | None = None) -> None:
    """One file in detail, with how to run it on a machine; of several a table, and what is worth a note in each."""
    first = results[0]
    if len(results) == 1:
        show_conversion(first, as_json, machine)
        return
    served = [(result, serving_of(result, machine)) for result in results]
    if as_json:
        print_json({"conversions": [conversion_as_json(*each) for each in served]})
        return
    if candidates := candidates_of(results):
        print_candidates(first.source, candidates)
    else:
        rows = [(r.output.name, human_bytes(r.bytes), f"{r.bits_per_weight:.2f}") for r in results]
        print_columns(f"{len(results)} files in {first.output.parent}", ("File", "Size", "Bits"), rows)
    runs = " in all runs" if first.resumed else ""
    print(f"Time, peak memory: {first.seconds:.1f} s{runs}, {human_bytes(first.peak_rss_bytes)}")
    shared = [line for line in first.problems if all(line in result.problems for result in results)]
    own = [f"{result.output.name}: {line}" for result in results for line in result.problems if line not in shared]
    show_problems((*shared, *own))
    lines = "\n".join(f"    {printable(run_line(*each))}" for each in served)
    print(f"Run one of them with\n\n{lines}\n")
