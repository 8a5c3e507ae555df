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
from moecast.archs.expressions import TensorInfo, stored_tensors
from moecast.archs.weights import Weight
from moecast.convert.gguf.writer import GGUFWriter
from moecast.convert.onnx.writer import OnnxWriter
from moecast.convert.writer import Writer
from moecast.runner import memory
from moecast.runner.activations import Workspace
from moecast.sources.read_ahead import StoredRows
from moecast.sources.storage import Storage
from torch import Tensor

SOON = 60.0  # seconds; what does not come by then never comes
STREAMS: dict[str, Any] = {"calibration": checkpoints.TEXT, "calibration_chunks": 4, "context": 64, "chunks": 2}
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
    """The first matrix of a stack is rounded until one of another expert has been read, which always comes."""
    read: set[TensorInfo] = set()
    came = threading.Condition()
    beside, quantize = Storage._read_beside, moecast.convert.encode.quantize_weight
    begun: set[str] = set()

    def noted(storage: Storage, rows: StoredRows) -> Tensor | None:
        data = beside(storage, rows)
        with came:
            read.add(rows.tensor)
            came.notify_all()
        return data

    def slow(values: Tensor, weight: Weight, experts: list[int | None], *rest: Any) -> Tensor:
        if weight.experts is not None and weight.name not in begun:
            begun.add(weight.name)
            others = {*stored_tensors(weight.source)} - {*stored_tensors(weight.source.of_expert(experts[0]))}
            with came:
                assert came.wait_for(lambda: not read.isdisjoint(others), SOON)
        return quantize(values, weight, experts, *rest)

    monkeypatch.setattr(Storage, "_read_beside", noted)
    monkeypatch.setattr(moecast.convert.encode, "quantize_weight", slow)
    convert(minimax_fp8.folder, tmp_path / "model.gguf", "Q8_0", **options)
    assert len(begun) == 6  # of two layers
