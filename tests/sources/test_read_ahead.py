"""Reading ahead: what is announced is what is read, in order, within a bound, and nothing depends on it."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import checkpoints
import pytest
import torch
from moecast.archs.expressions import Read, Rows, Stack, TensorInfo
from moecast.archs.rearranged import RowRuns
from moecast.archs.weights import Role, Weight
from moecast.errors import BadInput
from moecast.quant.planning.padding import pad
from moecast.sources.decode import evaluate
from moecast.sources.model import open_model, pieces
from moecast.sources.read_ahead import ReadAhead, StoredRows, stored_rows
from moecast.sources.storage import Storage

SOON = 60.0  # seconds; what does not come by then never comes
TENSOR = TensorInfo("t", "U8", (8, 4), "file", 0, 32)
FOLDERS = sorted(path.parent for path in checkpoints.EXAMPLES.glob("*/config.json"))


class Recording(Storage):
    """Notes what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[StoredRows] = []

    def read(self, tensor: TensorInfo, start: int = 0, stop: int | None = None) -> torch.Tensor:
        self.reads.append(StoredRows(tensor, start, tensor.rows if stop is None else stop))
        return super().read(tensor, start, stop)


def _check(weights: Iterable[Weight]) -> None:
    """What is announced of each piece is read, and what is not announced is small."""
    announced_bytes = read_bytes = 0
    for weight in weights:
        for piece in pieces(weight):
            storage = Recording()
            evaluate(weight.source, storage, *piece)
            announced = [*stored_rows(weight.source, *piece)]
            assert set(announced) <= set(storage.reads), weight.name
            announced_bytes += sum(rows.bytes for rows in set(announced))
            read_bytes += sum(rows.bytes for rows in set(storage.reads))
            storage.close()
    assert announced_bytes > 0.95 * read_bytes


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_announced_is_what_decoding_reads(folder: Path) -> None:
    graph = open_model(folder).graph
    _check(graph.weights())
    _check(pad(graph, 256).weights())


def test_fused_matrices_are_announced_by_their_parts(tmp_path: Path) -> None:
    """Up projections, which are the second halves of matrices of a stored stack, and of one matrix an expert."""
    (tmp_path / "file").write_bytes(bytes(3 * 8 * 4 * 2))
    path = str(tmp_path / "file")
    stored = Read(TensorInfo("stack", "BF16", (3, 8, 4), path, 0, 3 * 8 * 4 * 2))
    single = (Read(TensorInfo(f"{expert}", "BF16", (8, 4), path, expert * 64, 64)) for expert in range(3))
    sources = (Rows(source, 4, 8) for source in (stored, Stack(tuple(single))))
    _check(Weight("blk.0.ffn_up_exps.weight", Role.EXPERT_UP, (3, 4, 4), source) for source in sources)


def test_rows_in_another_order_are_announced_run_by_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(8 * 4 * 2))
    source = RowRuns(Read(TensorInfo("matrix", "BF16", (8, 4), str(tmp_path / "file"), 0, 64)), ((6, 8), (1, 4)))
    _check([Weight("blk.0.ffn_up.weight", Role.DENSE_UP, (5, 4), source)])


def _steps(count: int) -> list[list[StoredRows]]:
    return [[StoredRows(TENSOR, row, row + 1)] for row in range(count)]


class Source:
    """Gives rows that hold their own number; those whose gate is `shut` come when it opens."""

    def __init__(self, *shut: int) -> None:
        self.begun = [threading.Event() for _ in range(8)]
        self.gates = [threading.Event() for _ in range(8)]
        for row, gate in enumerate(self.gates):
            if row not in shut:
                gate.set()

    def read(self, rows: StoredRows) -> torch.Tensor:
        self.begun[rows.start].set()
        assert self.gates[rows.start].wait(SOON)
        return torch.full((rows.stop - rows.start, 4), rows.start, dtype=torch.uint8)

    def reads(self) -> list[int]:
        return [row for row, event in enumerate(self.begun) if event.is_set()]


def test_the_next_steps_are_read_during_this_one() -> None:
    """Two ahead of the one in use, and no further, whatever the limit allows."""
    source = Source()
    with ReadAhead(_steps(8), source.read, 1000) as ahead:
        assert source.begun[0].wait(SOON)
        for step in range(8):
            found = ahead.take(StoredRows(TENSOR, step, step + 1))
            assert found is not None and found.unique().tolist() == [step]
            for later in range(step, min(step + 3, 8)):  # while this step is computed with
                assert source.begun[later].wait(SOON)
            assert max(source.reads()) <= step + 2


def test_a_slow_read_is_waited_for_and_not_repeated() -> None:
    source = Source(1)
    with ReadAhead(_steps(3), source.read, 1000) as ahead:
        assert source.begun[1].wait(SOON)
        threading.Timer(0.05, source.gates[1].set).start()
        found = ahead.take(StoredRows(TENSOR, 1, 2))
        assert found is not None and found.unique().tolist() == [1]


def test_what_is_not_there_is_left_to_who_asks() -> None:
    """Not announced, not read yet, too large, behind."""
    source = Source(0)
    with ReadAhead(_steps(4), source.read, 8) as ahead:
        assert source.begun[0].wait(SOON)
        assert ahead.take(StoredRows(TENSOR, 2, 3)) is None  # while the first is being read
        assert ahead.take(StoredRows(TENSOR, 0, 1)) is None  # a step that is over
        assert ahead.take(StoredRows(TENSOR, 7, 8)) is None
        source.gates[0].set()
        assert source.begun[3].wait(SOON)
        assert 1 not in source.reads() and 2 not in source.reads()
    with ReadAhead(_steps(4), source.read, 3) as ahead:
        assert ahead.take(StoredRows(TENSOR, 3, 4)) is None


def test_no_more_is_kept_than_allowed() -> None:
    """Room for two rows of the three that are near."""
    source = Source()
    with ReadAhead(_steps(8), source.read, 8) as ahead:
        for step in range(7):
            assert source.begun[step].wait(SOON)
            assert ahead.take(StoredRows(TENSOR, step, step + 1)) is not None
            assert source.begun[step + 1].wait(SOON)
            assert max(source.reads()) <= step + 1


@pytest.mark.parametrize("failure", [OSError("gone"), MemoryError()])
def test_failures_are_met_again_by_who_asks(failure: Exception) -> None:
    called = threading.Event()

    def read(rows: StoredRows) -> torch.Tensor:
        called.set()
        raise failure

    with ReadAhead(_steps(3), read, 1000) as ahead:
        assert called.wait(SOON)
        assert [ahead.take(StoredRows(TENSOR, row, row + 1)) for row in range(3)] == [None] * 3


def test_storage_reads_the_same_with_and_without(tmp_path: Path) -> None:
    """Rows, parts of rows, rows twice; a file that ends early is refused at the read that needs its end."""
    content = torch.randint(0, 256, (64, 16), dtype=torch.uint8)
    (tmp_path / "file").write_bytes(content.numpy().tobytes())
    tensor = TensorInfo("t", "U8", (80, 16), str(tmp_path / "file"), 0, 80 * 16)
    steps = [[StoredRows(tensor, first, first + 8)] for first in range(0, 80, 8)]
    storage = Storage()
    with storage.reading_ahead(steps, 1000):
        for first in range(0, 64, 8):
            for start, stop in ((first, first + 8), (first + 2, first + 5), (first, first + 8), (first, first + 9)):
                assert torch.equal(storage.read(tensor, start, min(stop, 64)), content[start:stop])
        with pytest.raises(BadInput, match="ends inside tensor t: truncated"):
            storage.read(tensor, 64, 72)
    storage.close()
