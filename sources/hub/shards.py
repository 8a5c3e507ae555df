"""A checkpoint whose shards are fetched from the Hub shortly before they are read, and dropped after their last use."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ...archs.expressions import TensorInfo, stored_tensors
from ...archs.graph import Graph
from ...archs.weights import Weight
from ...errors import BadInput, Interrupted
from ...files import open_descriptor
from ..checkpoint import read_header
from ..model import Model
from ..storage import Storage
from .repository import HubCheckpoint
from .transfer import Meter, Watch

if TYPE_CHECKING:
    import torch

_FETCHERS = 2  # shards that arrive at the same time
_NEVER = 1 << 62
_LOOK = 0.2  # seconds between two looks at whether a shard has come
_SAID_EVERY = 30.0  # seconds of waiting for a shard between two lines about it
_PATIENCE = 0.5  # seconds that closing waits for threads, which may be waiting for the network


def pass_over(graph: Graph) -> list[list[str]]:
    """The stored tensors that each step of a pass reads: embedding, layer after layer, head; what is drafted last."""
    weights: list[Weight] = [*graph.weights(), *(graph.draft.weights() if graph.draft else ())]
    stored = (weight for weight in weights if any(stored_tensors(weight.source)))
    steps = (list(step) for _, step in groupby(stored, key=lambda weight: weight.layer))
    return [[tensor.name for weight in step for tensor in stored_tensors(weight.source)] for step in steps]


def fetch_on_demand(model: Model, checkpoint: HubCheckpoint, scratch: int | None, folder: Path) -> None:
    """The weights of a model that was opened by a repository's headers come when they are read. See `ShardStorage`."""
    model.storage = ShardStorage(checkpoint, model.tensors, pass_over(model.graph), scratch, folder)


class ShardStorage(Storage):
    """Reads tensors from shards in a folder, which holds at most `scratch` bytes of them at any time.

    Threads fetch the shards in the order in which the pass will read them, as many ahead as there is room for; the
    shards of the step that is being read stay. When the reader goes on, what it will not need, or not before others
    that fit, is dropped; should it need such a shard after all, it is fetched once more. Shards that the Hugging Face
    cache holds are read from there. Errors of a fetch are raised to the reader, who waits for the shard.

    Args:
        checkpoint: one commit of a repository.
        tensors: what it holds, offsets within the shards.
        steps: names of the tensors that are read together, in the order of the pass.
        scratch: bytes; by default twice what the largest step needs.
        folder: where the shards lie. It is made when the first one comes; what an interrupted run left is used.

    Raises BadInput when the shards of one step alone are larger than `scratch`; reading raises Interrupted.
    """

    def __init__(
        self,
        checkpoint: HubCheckpoint,
        tensors: Sequence[TensorInfo],
        steps: Sequence[Sequence[str]],
        scratch: int | None,
        folder: Path,
    ) -> None:
        super().__init__()
        self._checkpoint = checkpoint.in_folder(folder)
        self._files = {file.name: file for file in checkpoint.listing.files if file.is_shard}
        self._cached = {name: path for name, file in self._files.items() if (path := checkpoint.cached_file(file))}
        shard_of = {tensor.name: tensor.file for tensor in tensors}
        self._promised: dict[str, set[tuple[object, ...]]] = {name: set() for name in self._files}
        for tensor in tensors:
            self._promised[tensor.file].add((tensor.name, tensor.dtype, tensor.shape, tensor.offset))
        self._names, self._shard_of = steps, shard_of
        self._uses = self._uses_in(steps)
        self._limit = scratch
        self._steps = [{shard_of[name] for name in names} for names in steps]
        self._scratch = self._room_for(self._steps, scratch)
        self._position = -1
        self._wanted: list[str] = []  # nearest use first; together they fit
        self._here: set[str] = set()
        self._coming: dict[str, Meter] = {}
        self._failed: dict[str, BaseException] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._threads: list[threading.Thread] = []

    @property
    def bytes_to_fetch(self) -> int:
        """Size of all shards that are read and not in the Hugging Face cache."""
        return sum(self._files[name].bytes for name in self._files.keys() & self._uses.keys() - self._cached.keys())

    @property
    def scratch(self) -> int:
        """The most that the shards will take of the disk."""
        return min(self._scratch, self.bytes_to_fetch)

    def read(self, tensor: TensorInfo, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if tensor.file not in self._cached:
            self._require(tensor)
        return super().read(tensor, start, stop)

    def expect_only(self, names: Collection[str]) -> None:
        """Of all tensors only these will be read: shards without them are not fetched."""
        with self._changed:
            self._uses = self._uses_in([[name for name in step if name in names] for step in self._names])

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for meter in self._coming.values():
                meter.stopped.set()
            self._changed.notify_all()
        end = time.monotonic() + _PATIENCE
        for thread in self._threads:
            thread.join(max(0, end - time.monotonic()))
        super().close()

    def _open(self, file: str) -> int:
        try:
            return open_descriptor(self._cached.get(file, self._checkpoint.folder / file))
        except FileNotFoundError:  # somebody has emptied the folder, or the Hub's cache
            with self._changed:
                self._here.discard(file)
                if self._cached.pop(file, None):
                    self._make_room_for(file)
                self._choose(file)
                self._await(file)
            return open_descriptor(self._checkpoint.folder / file)

    def _path(self, file: str) -> Path | None:
        with self._changed:
            here = self._checkpoint.folder / file if file in self._here else None
            return self._cached.get(file, here)

    def _uses_in(self, steps: Sequence[Sequence[str]]) -> dict[str, list[int]]:
        """By tensor, and by shard, the steps that read it."""
        uses: dict[str, list[int]] = {}
        for number, names in enumerate(steps):
            for name in dict.fromkeys((*names, *(self._shard_of[name] for name in names))):
                uses.setdefault(name, []).append(number)
        return uses

    def _make_room_for(self, vanished: str) -> None:
        """What the cache does not hold any more has to be fetched like all else."""
        try:
            self._scratch = self._room_for(self._steps, self._limit)
        except BadInput as error:
            raise Interrupted(f"{vanished} is gone from the Hugging Face cache: {error}") from None

    def _room_for(self, steps: Sequence[set[str]], scratch: int | None) -> int:
        """Bytes of disk to use for steps that each read certain shards."""
        largest = max(sum(self._files[shard].bytes for shard in shards - self._cached.keys()) for shards in steps)
        if scratch is not None and largest > scratch:
            raise BadInput(
                f"--scratch is {scratch / 1e9:.6g} GB, but one layer needs shards of {largest / 1e9:.6g} GB at once: "
                "give at least that, or --keep-source to download everything"
            )
        return 2 * largest if scratch is None else scratch

    def _require(self, tensor: TensorInfo) -> None:
        """Wait until a tensor's shard is there. Raises what went wrong with fetching it."""
        with self._changed:
            uses = self._uses.get(tensor.name, [self._position])
            position = next((step for step in uses if step >= self._position), uses[0])  # else a pass begins anew
            if position != self._position or tensor.file not in self._wanted:
                self._position = position
                self._choose(tensor.file)
            if tensor.file not in self._here:
                self._await(tensor.file)

    def _await(self, shard: str) -> None:
        """Wait for a shard that is chosen. Raises what went wrong with it, and Interrupted when nothing moves."""
        self._failed.pop(shard, None)  # that was earlier, when nobody waited
        self._changed.notify_all()
        said, watch = time.monotonic(), Watch()
        while shard not in self._here:
            if shard in self._failed:
                raise self._failed.pop(shard)
            for meter in self._coming.values():  # others make room when they are done
                watch.follow(meter)
            watch.require_life(self._checkpoint.url)
            if time.monotonic() - said > _SAID_EVERY:
                said = time.monotonic()
                here, size = self._checkpoint.bytes_here(self._files[shard]), self._files[shard].bytes
                self._checkpoint.notes.note(f"Waiting for {shard}: {here / 1e6:.1f} of {size / 1e6:.1f} MB are here")
            self._changed.wait(_LOOK)

    def _choose(self, first: str) -> None:
        """Decide what to have on disk from here on: `first`, then what is used next, as far as it fits."""
        coming = sorted(self._files.keys() - self._cached.keys(), key=lambda shard: (self._next_use(shard), shard))
        room, self._wanted = self._scratch, []
        for shard in dict.fromkeys((first, *coming)):
            room -= self._files[shard].bytes
            if shard != first and (room < 0 or self._next_use(shard) == _NEVER):
                break
            self._wanted.append(shard)
        for shard in self._files.keys() - self._cached.keys() - self._coming.keys() - set(self._wanted):
            self._drop(shard)
        if not self._threads:
            self._threads = [threading.Thread(target=self._fetch_ahead, daemon=True) for _ in range(_FETCHERS)]
            for thread in self._threads:
                thread.start()
        self._changed.notify_all()

    def _next_use(self, shard: str) -> int:
        return next((step for step in self._uses.get(shard, ()) if step >= self._position), _NEVER)

    def _drop(self, shard: str) -> None:
        self._forget(shard)
        self._here.discard(shard)
        self._checkpoint.remove_file(self._files[shard])

    def _fetch_ahead(self) -> None:
        """What each thread does until the storage is closed."""
        while (shard := self._take()) is not None:
            error: BaseException | None = None
            try:
                self._check(shard, self._checkpoint.fetch_file(self._files[shard], self._coming[shard]))
            except BaseException as raised:  # the reader's business, in whose thread it can be raised
                error = raised
            with self._changed:
                del self._coming[shard]
                if error is None and shard not in self._wanted:
                    error = self._removed(shard)
                elif error is None:
                    self._here.add(shard)
                if error is not None:
                    self._failed[shard] = error
                self._changed.notify_all()

    def _removed(self, shard: str) -> OSError | None:
        """Takes away a shard that nobody wants any more; what goes wrong with that is the reader's business too."""
        try:
            self._checkpoint.remove_file(self._files[shard])
        except OSError as error:
            return error
        return None

    def _check(self, shard: str, path: Path) -> None:
        """The shard is what its checksum says; were tensors read from where a false header had put them?"""
        found = {(tensor.name, tensor.dtype, tensor.shape, tensor.offset) for tensor in read_header(path)}
        if found != self._promised[shard]:
            raise Interrupted(
                f"{shard} has another header than the one that {self._checkpoint.url} sent alone: "
                "a proxy or mirror may be at fault, try again later or without it"
            )

    def _take(self) -> str | None:
        """The shard to fetch next, once there is room for it; None when the storage is closed."""
        with self._changed:
            while not self._closed:
                for shard in self._wanted:
                    if shard not in self._here | self._coming.keys() | self._failed.keys():
                        taken = sum(self._files[name].bytes for name in self._here | self._coming.keys())
                        if taken and taken + self._files[shard].bytes > self._scratch:
                            break
                        self._coming[shard] = Meter(None, 0, self._checkpoint.notes)
                        return shard
                self._changed.wait()
            return None
