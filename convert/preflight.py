"""Checks the disk before a conversion begins, and says what it will fetch and write."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..errors import Interrupted
from ..progress import Progress
from ..quant.planning.plan import Plan
from ..sources.hub.shards import ShardStorage
from ..sources.model import Model
from .onepass import PassInputs
from .resume.journal import Journal


def check_disk(
    path: Path,
    plans: Sequence[Plan],
    model: Model,
    inputs: PassInputs,
    memory: int | None,
    journal: Journal,
    progress: Progress,
) -> None:
    """Note what a first run fetches and writes, and the most that is on disk. Raises Interrupted when there is no
    room."""
    shards = model.storage if isinstance(model.storage, ShardStorage) else None
    fetched, scratch = (shards.bytes_to_fetch, shards.scratch) if shards else (0, 0)
    # The journal keeps two states of the streams while it saves; within a layer, inputs and outputs may be on disk too.
    states = _state_bytes(plans, inputs) * (2 if memory is None else 5)
    size, there = sum(plan.bytes for plan in plans), journal.bytes_on_disk
    peak = size + scratch + states
    free = shutil.disk_usage(path.parent).free + there
    facts = [f"{_size(fetched)} to fetch, at most {_size(scratch)} of it on disk"] if shards else []
    facts.append(f"{_size(size)} to write")
    facts += [f"{_size(memory)} of memory"] if memory is not None else []
    facts.append(f"at most {_size(peak)} of the {_size(free)} that are free in {path.parent.resolve()}")
    if not journal.continues:
        progress.note(f"Starting: {', '.join(facts)}")
    if peak > free:
        raise Interrupted(
            f"{path.parent.resolve()} has no room: {_size(peak)} are needed and {_size(free)} are free; "
            "make room, choose another --output or a smaller --quant"
        )


def note_resumption(there: int, size: int, model: Model, progress: Progress) -> None:
    """Note how many bytes of the output are there, and what is still to fetch."""
    total, unit = _size(size).split()
    part = _size(there, unit).split()[0]
    shards = model.storage if isinstance(model.storage, ShardStorage) else None
    fetched = f", {_size(shards.bytes_to_fetch)} to fetch" if shards else ""
    progress.note(f"Resuming: {part} of {total} {unit} are there{fetched}")


def _state_bytes(plans: Sequence[Plan], inputs: PassInputs) -> int:
    """What the streams' states take between two layers."""
    return 4 * max(plan.graph.residual_size for plan in plans) * inputs.tokens(len(plans))


def _size(count: int, unit: str | None = None) -> str:
    """In GB or MB, as it suits or as asked."""
    unit = unit or ("GB" if count >= 1e9 else "MB")
    return f"{count / (1e9 if unit == 'GB' else 1e6):.3g} {unit}"
