"""Reading, computing and writing side by side: the threads that do them, and that no byte depends on it."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import moecast.convert.encode
import pytest
from conftest import Checkpoint
from conversions import convert
from moecast.convert.gguf.writer import GGUFWriter
from moecast.convert.onnx.writer import OnnxWriter
from moecast.convert.writer import Writer
from moecast.runner import memory
from moecast.runner.activations import Workspace
from moecast.sources.read_ahead import StoredRows
from moecast.sources.storage import Storage
from torch import Tensor

SOON = 60.0  # seconds; what does not come by then never comes
STREAMS: dict[str, Any] = {"calibration": checkpoints.TEXT, "context": 64, "chunks": 2}
ALONE: dict[str, Any] = {"calibration": None, "verify": False}


def _files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.whole
@pytest.mark.parametrize("options", [STREAMS, ALONE], ids=["streams", "alone"])
@pytest.mark.parametrize(("form", "writer"), [("gguf", GGUFWriter), ("onnx", OnnxWriter)])
def test_same_bytes_with_and_without(
    minimax_fp8: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    writer: type[Writer],
    options: dict[str, Any],
) -> None:
    """Without buffers one thread does everything; with them, all is written by another one."""
    threads: set[threading.Thread] = set()
    write = writer.write
    monkeypatch.setattr(writer, "write", lambda *piece: threads.add(threading.current_thread()) or write(*piece))
    parities = []
    for buffer in (0, 64 << 20):
        threads.clear()
        with monkeypatch.context() as patched:
            patched.setattr(memory, "Workspace", partial(Workspace, buffer=buffer))
            output = tmp_path / f"{buffer}" / "model"
            parities.append(convert(minimax_fp8.folder, output, file_format=form, **options).parity)
        assert (threading.current_thread() in threads) == (buffer == 0) and len(threads) == 1
    assert parities[0] == parities[1]
    assert _files(tmp_path / "0") == _files(tmp_path / f"{64 << 20}")


@pytest.mark.whole
@pytest.mark.parametrize("options", [STREAMS, ALONE], ids=["streams", "alone"])
def test_experts_are_read_while_others_are_rounded(
    minimax_fp8: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """While one matrix is rounded, what comes later is read: rounding waits for that, and it always comes."""
    read: list[StoredRows] = []
    came = threading.Condition()
    beside, quantize = Storage._read_beside, moecast.convert.encode.quantize_weight
    waited = 0

    def noted(storage: Storage, rows: StoredRows) -> Tensor | None:
        data = beside(storage, rows)
        with came:
            read.append(rows)
            came.notify_all()
        return data

    def slow(values: Tensor, weight: Any, expert: int | None, *rest: Any) -> Tensor:
        nonlocal waited
        if weight.experts is not None and waited < 2 * weight.experts:  # of 2 layers, 3 stacks each
            waited += 1
            with came:
                assert came.wait_for(lambda: len(read) >= waited, SOON)
        return quantize(values, weight, expert, *rest)

    monkeypatch.setattr(Storage, "_read_beside", noted)
    monkeypatch.setattr(moecast.convert.encode, "quantize_weight", slow)
    convert(minimax_fp8.folder, tmp_path / "model.gguf", "Q8_0", **options)
    assert waited == 2 * 16
