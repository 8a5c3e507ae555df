"""What llama.cpp has to be told at every start, because it reads it from no file."""

from __future__ import annotations

from .graph import Graph, Yarn, parts_in
from .shared import YARN_FAST, YARN_SLOW

SERVER = "llama-server"


def start_options(graph: Graph, program: str = SERVER) -> tuple[str, ...]:
    """Options without which a program of its computes another model.

    YaRN's limits, where they are not its own; flash attention, where selected blocks need it, and one text at a time,
    because the server takes several by itself.
    """
    limits = {(yarn.fast, yarn.slow) for yarn in parts_in(graph.layers, Yarn)} - {(YARN_FAST, YARN_SLOW)}
    yarn = (("--yarn-beta-fast", f"{fast:g}", "--yarn-beta-slow", f"{slow:g}") for fast, slow in limits)
    attention = ("-fa", "on") if graph.needs_flash_attention else ()
    alone = ("-np", "1") if attention and program == SERVER else ()
    return (*attention, *alone, *(option for options in yarn for option in options))
