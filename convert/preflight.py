"""What a conversion will take, said before it begins, and refused where the disk is too small for it."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..archs.errors import Interruption
from ..quant.plan import Plan
from ..sources.model import Model
from ..sources.progress import Progress
from ..sources.shards import ShardStorage
from .journal import Journal
from .onepass import Lanes


def check_disk(path: Path, plan: Plan, model: Model, lanes: Lanes, journal: Journal, progress: Progress) -> None:
    """Note what is fetched and written, and the most that is on disk. Raises Interruption when there is no room."""
    shards = model.storage if isinstance(model.storage, ShardStorage) else None
    fetched, scratch = (shards.bytes_to_fetch, shards.scratch) if shards else (0, 0)
    peak, there = plan.bytes + scratch + 2 * _state_bytes(plan, lanes), journal.bytes_on_disk
    free = shutil.disk_usage(path.parent).free
    facts = [f"{_size(fetched)} to fetch, at most {_size(scratch)} of it on disk"] if shards else []
    facts.append(f"{_size(plan.bytes)} to write")
    facts.append(f"at most {_size(peak)} of the {_size(free + there)} that are free in {path.parent.resolve()}")
    progress.note(f"{'Goes on' if journal.continues else 'Begins'}: {', '.join(facts)}")
    if peak > free + there:
        raise Interruption(
            f"{path.parent.resolve()} has no room: {_size(peak)} are needed and {_size(free + there)} are free; "
            "make room, choose another --output or a smaller --quant"
        )


def _state_bytes(plan: Plan, lanes: Lanes) -> int:
    """What the lanes' states take between two layers, of which the journal keeps two while it saves."""
    graph = plan.graph
    width = graph.hidden_size * (graph.residual.streams if graph.residual else 1)
    calibration, evaluation = (
        tokens.numel() if tokens is not None else 0 for tokens in (lanes.calibration, lanes.evaluation)
    )
    return 4 * width * (calibration + 2 * evaluation)


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
