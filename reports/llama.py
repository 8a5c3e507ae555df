"""What llama.cpp's programs have to be told of a model."""

from __future__ import annotations

from ..archs.graph import Graph


def needed_options(graph: Graph, program: str) -> tuple[str, ...]:
    """Options without which a program computes another model; the server takes several texts at once by itself."""
    if not graph.needs_flash_attention:
        return ()
    return ("-fa", "on", "-np", "1") if program == "llama-server" else ("-fa", "on")
