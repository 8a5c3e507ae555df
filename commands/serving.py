"""How llama.cpp runs a file on a machine: the lines to type, and how fast tokens can come at most."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..archs.llama_options import SERVER, start_options
from ..reports.text import draft_options
from .console import human_bytes
from .terminal import printable

if TYPE_CHECKING:
    from ..archs.graph import Graph
    from ..quant.planning.fit import Machine, MachinePlan

_TEMPLATE = "--jinja"  # to use the file's chat template
_DRIVER = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")  # in MiB


def this_machine(context: int, ram: int | None = None, vram: int | None = None) -> Machine:
    """The machine that this is, but for what is given."""
    from ..files import memory_bytes
    from ..quant.planning.fit import Machine

    return Machine(memory_bytes() if ram is None else ram, _vram() if vram is None else vram, context)


def _vram() -> int:
    """Bytes of memory of all GPUs, by torch, or by the driver where torch is built without CUDA."""
    from ..runner.placement import gpu_named, names

    if gpus := [gpu_named(name) for name in names() if name.startswith("cuda")]:
        return sum(gpu.total for gpu in gpus)
    driver = shutil.which(_DRIVER[0])
    try:
        shown = subprocess.run((driver, *_DRIVER[1:]), capture_output=True, text=True, timeout=60) if driver else None
        return sum(int(line) << 20 for line in shown.stdout.split()) if shown else 0
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return 0


@dataclass(frozen=True)
class Serving:
    """A file that llama.cpp is to run.

    Attributes:
        model: what to call it.
        graph: what is in it.
        template: whether it has a chat template.
        fit: where a machine keeps its parts, None where that does not have the memory.
        draft: a file beside it that drafts tokens.
    """

    model: str | Path
    graph: Graph
    context: int
    template: bool
    fit: MachinePlan | None
    draft: Path | None = None

    def facts(self) -> dict[str, Any]:
        """Memory beside the weights, what bounds the speed, and lines for a server and a chat."""
        lines = {"serve": self.line(), "chat": self.line("llama-cli")}
        if not self.fit:
            return lines
        from ..runner.bandwidth import memory_bandwidth

        return {
            "state_bytes": self.fit.state_bytes,
            "working_bytes": self.fit.working_bytes,
            "ram_bytes_per_token": self.fit.ram_bytes_per_token,
            "memory_bandwidth": memory_bandwidth(),
            "layers_in_ram": self.fit.layers_in_ram,
            **lines,
        }

    def show(self) -> None:
        facts = self.facts()
        if self.fit:
            _show_memory(facts, self.context)
        else:
            print(
                f"With {self.context} tokens of context it takes more memory than this machine has: llama.cpp reads "
                "from disk what does not fit, again for every token"
            )
        print(f"Serve it, or chat with it, by\n\n    {printable(facts['serve'])}\n    {printable(facts['chat'])}\n")

    def line(self, program: str = SERVER) -> str:
        """What to type."""
        options = ((_TEMPLATE,) if self.template else ()) + start_options(self.graph, program)
        placed = (*self._on_gpu(), *(self._drafting() if program == SERVER else ()))
        return " ".join(map(str, (program, "-m", self.model, "-c", self.context, *options, *placed)))

    def _drafting(self) -> tuple[str, ...]:
        """The options for what drafts tokens, whose experts stay in RAM beside a GPU."""
        in_ram = ("--cpu-moe-draft",) if self.draft and self._on_gpu() and self.graph.experts else ()
        return (*draft_options(self.graph, self.draft), *in_ram)

    def _on_gpu(self) -> tuple[str | int, ...]:
        """The options for a GPU; the head counts as a layer beside those that the GPU holds as a whole."""
        if not self.fit or not self.fit.machine.vram:
            return ()
        in_ram = self.fit.layers_in_ram
        if self.graph.experts:
            return "--n-gpu-layers", 99, "--n-cpu-moe", in_ram
        return "--n-gpu-layers", len(self.graph.layers) - in_ram + 1


def _show_memory(facts: Mapping[str, Any], context: int) -> None:
    print(f"State of {context} tokens: {human_bytes(facts['state_bytes'])}, ", end="")
    print(f"working memory: about {human_bytes(facts['working_bytes'])}")
    if read := facts["ram_bytes_per_token"]:
        bandwidth = facts["memory_bandwidth"]
        rate = bandwidth / read
        print(
            f"A token reads {human_bytes(read)} of weights from RAM: at most "
            f"{rate:.{0 if rate >= 10 else 1}f} tokens a second, if RAM is as fast as this machine's "
            f"({human_bytes(bandwidth)}/s measured now) and what lies on a GPU costs nothing"
        )
