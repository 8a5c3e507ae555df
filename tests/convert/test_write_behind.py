"""Writing behind: pieces are written while others are made, in their order, and nothing is lost or said too late."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from moecast.convert.write_behind import WriteBehind
from moecast.convert.writer import Writer
from moecast.errors import Interrupted
from torch import Tensor

SOON = 60.0  # seconds; what does not come by then never comes


class Kept(Writer):
    """Keeps pieces in memory; writing one waits for its gate, or fails where it is told to."""

    def __init__(self, shut: bool = False, fails_at: int | None = None) -> None:
        super().__init__("kept", [Path("kept")], [], None)
        self.pieces: dict[tuple[str, int], Tensor] = {}
        self.threads: list[threading.Thread] = []
        self.begun, self.gate = threading.Semaphore(0), threading.Semaphore(0 if shut else 1000)
        self._fails_at = fails_at

    def read(self, name: str, first_row: int, count: int) -> Tensor:
        return self.pieces[name, first_row][:count]

    def write(self, name: str, first_row: int, rows: Tensor) -> None:
        self.begun.release()
        assert self.gate.acquire(timeout=SOON)
        if len(self.pieces) == self._fails_at:
            raise Interrupted("the disk is full")
        self.threads.append(threading.current_thread())
        self.pieces[name, first_row] = rows
        self._wrote(name, first_row, len(rows), [rows])

    def _stored_parts(self, name: str, first_row: int, rows: int) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        raise NotImplementedError


def _piece(number: int) -> Tensor:
    return torch.full((2, 4), number, dtype=torch.uint8)


def test_the_next_piece_is_made_while_one_is_written() -> None:
    """Three are handed over before the first is written; the fourth finds no room until then."""
    writer = Kept(shut=True)
    with WriteBehind(writer, 24) as behind:
        for number in range(3):
            behind.write("t", 2 * number, _piece(number))
        assert writer.begun.acquire(timeout=SOON)
        assert writer.pieces == {} and all(behind.has("t", row) for row in (0, 2, 4)) and not behind.has("t", 6)
        fourth = threading.Thread(target=behind.write, args=("t", 6, _piece(3)))
        fourth.start()
        fourth.join(0.3)
        assert fourth.is_alive() and not behind.has("t", 6)
        writer.gate.release()
        fourth.join(SOON)
        assert behind.has("t", 6) and [*writer.pieces] == [("t", 0)]
        writer.gate.release(3)
        behind.flush()
        assert [*writer.pieces] == [("t", 0), ("t", 2), ("t", 4), ("t", 6)]
        assert threading.current_thread() not in writer.threads
    for number in range(4):
        assert torch.equal(writer.pieces["t", 2 * number], _piece(number))


def test_a_piece_that_waits_is_read_like_any_other() -> None:
    writer = Kept(shut=True)
    with WriteBehind(writer, 100) as behind:
        behind.write("t", 0, _piece(1))
        behind.write("t", 2, _piece(2))
        threading.Timer(0.05, writer.gate.release, (2,)).start()
        assert torch.equal(behind.read("t", 2, 2), _piece(2))


@pytest.mark.parametrize("limit", [0, 7])
def test_larger_pieces_are_written_at_once(limit: int) -> None:
    """With no room at all everything is as without this."""
    writer = Kept()
    with WriteBehind(writer, limit) as behind:
        behind.write("t", 0, _piece(1))
        assert writer.threads == [threading.current_thread()]
        assert torch.equal(writer.pieces["t", 0], _piece(1))


def test_a_larger_piece_waits_for_those_before_it() -> None:
    writer = Kept()
    with WriteBehind(writer, 8) as behind:
        behind.write("t", 0, _piece(1))
        behind.write("t", 2, torch.zeros(4, 4, dtype=torch.uint8))
        assert [*writer.pieces] == [("t", 0), ("t", 2)]


def test_a_full_disk_is_raised_by_the_next_call() -> None:
    """Whatever that is; what waited behind it is not written."""
    for call in ("write", "read", "flush", "leave"):
        writer = Kept(shut=True, fails_at=1)
        with pytest.raises(Interrupted, match="the disk is full"), WriteBehind(writer, 100) as behind:
            for number in range(3):
                behind.write("t", 2 * number, _piece(number))
            writer.gate.release(1000)
            if call == "write":
                for number in range(3, 1000):
                    behind.write("t", 2 * number, _piece(number))
            elif call == "read":
                behind.read("t", 4, 2)
            elif call == "flush":
                behind.flush()
        assert [*writer.pieces] == [("t", 0)]


def test_leaving_by_an_exception_writes_what_waits() -> None:
    """So that it need not be made again; and the exception stays the one it was."""
    writer = Kept(shut=True)
    with pytest.raises(KeyboardInterrupt), WriteBehind(writer, 100) as behind:
        for number in range(5):
            behind.write("t", 2 * number, _piece(number))
        threading.Timer(0.05, writer.gate.release, (5,)).start()
        raise KeyboardInterrupt
    assert len(writer.pieces) == 5
