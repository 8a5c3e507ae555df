"""Conversions of a tiny checkpoint: `elsewhere.py SYSTEM SOURCE TEXT FOLDER` prints what was noted, as JSON.

SYSTEM is "this", or "other": then what only Linux has is taken away first, no lock can be had, and a file that is open
can be neither removed nor renamed, as on Windows.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

LINUX = (
    "fstatvfs", "posix_fallocate", "fdatasync", "pread", "pwrite", "preadv", "pwritev", "sched_getaffinity", "sysconf",
    "O_DIRECTORY",
)  # fmt: skip


def become_another_system() -> None:
    """Before anything of ours is imported."""
    for name in LINUX:
        delattr(os, name)
    sys.modules["fcntl"] = sys.modules["resource"] = None  # type: ignore[assignment]
    for name in ("replace", "rename", "unlink", "remove"):
        setattr(os, name, _of_closed_files(getattr(os, name)))
    import shutil
    import tempfile

    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # type: ignore[misc,assignment]


def _of_closed_files(call: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*arguments: Any, **named: Any) -> Any:
        for path in arguments:
            if os.path.realpath(path) in _open_files():
                raise PermissionError(13, "The process cannot access the file because it is being used", str(path))
        return call(*arguments, **named)

    return checked


def _open_files() -> set[str]:
    numbers = os.listdir("/proc/self/fd")
    return {os.readlink(f"/proc/self/fd/{number}") for number in numbers if os.path.lexists(f"/proc/self/fd/{number}")}


def main() -> None:
    import json
    from pathlib import Path

    import conversions
    import moecast.convert.encode as encode
    import moecast.convert.pipeline as pipeline
    from moecast.progress import NoProgress
    from moecast.runner.activations import Workspace

    source, text, folder = map(Path, sys.argv[2:])
    notes: list[str] = []

    class Noting(NoProgress):
        def note(self, line: str) -> None:
            notes.append(line)

    def make(name: str, **options: Any) -> None:
        conversions.convert(source, folder / name, verify=False, threads=1, progress=Noting(), **options)

    folder.mkdir()
    make("plain.gguf", quant="Q4_K_M", calibration=None)
    make("onnx", file_format="onnx", calibration=None)
    # All activations on disk, stopped within a layer, and once more to the end.
    pipeline.workspace = lambda *arguments: Workspace(0, folder)
    options = {"quant": "IQ4_XS", "context": 64, "chunks": 3, "calibration": text, "save_to": folder / "i.gguf"}
    quantize, left = encode.quantize_weight, iter(range(40))

    def stopping(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return quantize(*arguments)

    encode.quantize_weight = stopping
    try:
        make("calibrated.gguf", **options)
    except KeyboardInterrupt:
        notes.append("stopped")
    encode.quantize_weight = quantize
    make("calibrated.gguf", **options)
    print(json.dumps(notes))


if __name__ == "__main__":
    if sys.argv[1] == "other":
        become_another_system()
    main()
