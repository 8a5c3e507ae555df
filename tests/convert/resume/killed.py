"""Converts a checkpoint under SIGKILL: `killed.py SOURCE FOLDER KILLS SEED OPTIONS` prints what came out, as JSON.

SOURCE is a folder or the id of a repository, whose shards are streamed.

Every attempt is a fork of one process that has loaded everything, so that it takes a moment and not seconds. Odd kills
come after a random time. Even ones come before or after a random system call that changes files: half of these are
among the last ones, where files get their names and the journal goes. Whenever an output is complete it is looked at,
and the next attempt begins anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conversions import convert
from moecast.convert.resume import journal
from moecast.convert.settings import Goal

CALLS = ("pwrite", "ftruncate", "replace", "unlink", "rmdir", "mkdir")
SYNCHRONIZING = ("fdatasync", "fsync")
TAIL = 20


class Calls:
    """Counts the calls that change files, and ends the process at one of them."""

    def __init__(self, last: float, after: bool) -> None:
        self.count, self._last, self._after = 0, last, after
        for name in CALLS:
            setattr(os, name, self._counted(getattr(os, name)))
        for name in SYNCHRONIZING:  # a killed process loses nothing that it wrote, so these may take no time
            setattr(os, name, self._counted(lambda descriptor: None))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            if self.count >= self._last and not self._after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **named)
            if self.count >= self._last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted


def make(source: str, output: Path, size: int | None = None, **options: Any) -> None:
    """A conversion, by a plan for `size` bytes that is measured first."""
    goal = options.pop("quant", None) if size is None else Goal(size=size)
    convert(source, output, goal, threads=1, error_feedback=options.pop("error_feedback", False), **options)


def attempt(
    source: str, folder: Path, options: dict[str, Any], calls: tuple[float, bool], seconds: float | None
) -> tuple[bool, int]:
    """One conversion in a process of its own: whether it finished, and how many calls it made."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            counter = Calls(*calls)
            alone = options.get("file_format") != "onnx" and not isinstance(options.get("quant"), list)
            make(source, folder / "model.gguf" if alone else folder, **options)
            os.write(writer, str(counter.count).encode())
            os._exit(0)
        except BaseException as error:
            if "exists: use --overwrite" in str(error):  # killed after all was done: the journal had gone
                os._exit(0)
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    os.close(writer)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    count = os.read(reader, 20)
    os.close(reader)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(f"the conversion failed; left: {sorted(file.name for file in folder.iterdir())}")
    return not os.WIFSIGNALED(status), int(count or 0)


def outcome(folder: Path) -> dict[str, str]:
    """Digests of all files, but of what is known of rounding errors, which of the layer in flight is only a part."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and not file.match("*.fingerprints.json"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main() -> None:
    source, folder = sys.argv[1], Path(sys.argv[2])
    kills, generator, options = int(sys.argv[3]), random.Random(int(sys.argv[4])), json.loads(sys.argv[5])
    torch.set_num_threads(1)
    journal.BATCH_SECONDS = 0.0  # every piece is a batch
    folder.mkdir()
    for _ in range(2):  # the first may fill the Hub's cache, which the others find filled
        shutil.rmtree(folder)
        folder.mkdir()
        started = time.monotonic()
        _, calls = attempt(source, folder, options, (float("inf"), False), None)
        duration = time.monotonic() - started
    expected, outcomes, killed, finished = outcome(folder), [], 0, True
    while killed < kills or not finished:
        if finished:
            shutil.rmtree(folder)
            folder.mkdir()
        limit, seconds, after = float("inf"), None, generator.random() < 0.5
        journal.BATCH_SECONDS = 0.02 * (killed % 2)
        if killed < kills and killed % 2:
            seconds = generator.uniform(0, duration)
        elif killed < kills:
            limit = generator.uniform(1, calls) if killed % 4 else generator.uniform(calls - TAIL, calls)
        done, _ = attempt(source, folder, options, (limit, after), seconds)
        killed += not done
        finished = done
        if done:
            outcomes.append(outcome(folder))
    wrong = [found for found in outcomes if found != expected]
    print(json.dumps({"expected": expected, "outcomes": len(outcomes), "wrong": wrong, "calls": calls}))


if __name__ == "__main__":
    main()
