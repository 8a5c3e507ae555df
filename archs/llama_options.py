"""What llama.cpp has to be told at every start, because it reads it from no file."""

from __future__ import annotations

from .graph import Graph, Yarn, parts_in
from .shared import YARN_FAST, YARN_SLOW


def start_options(graph: Graph) -> tuple[str, ...]:
    """Options of its programs for a model: YaRN's limits, where they are not its own."""
    limits = {(yarn.fast, yarn.slow) for yarn in parts_in(graph.layers, Yarn)} - {(YARN_FAST, YARN_SLOW)}
    return tuple(
        option for fast, slow in limits for option in ("--yarn-beta-fast", f"{fast:g}", "--yarn-beta-slow", f"{slow:g}")
    )
