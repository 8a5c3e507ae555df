"""Write-ahead journal of one output: lists the pieces that are durable on disk, so that an interrupted run resumes.

Beside an output NAME lies the folder `.NAME.journal` with the file `records` and tensors saved on the way. The header
of `records` is the fingerprint of what is made; each further line lists keys of what has become durable since. Data are
synchronized before the line that names them is written, so no line promises what a power cut could take back. Disks
break promises all the same: lines and saved tensors carry checksums, and what is damaged counts as not done.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.lib.format as npy
import torch
from torch import Tensor

from ... import __version__
from ...documents import exists
from ...errors import BadInput, Interrupted, OutputExists
from ...files import bytes_on_disk, lock, open_descriptor, read_at, sync, sync_folder, write_at
from ...progress import NoProgress, Progress
from .fingerprint import differences
from .records import SAVED, STARTED, Key, Spent, entry, read_record, sealed

BATCH_BYTES = 256 << 20  # this much is written before it is made durable
BATCH_SECONDS = 2.0  # or for this long

_READ = 16 << 20  # bytes of a file at once
_SHOWN = 3  # of what differs from an earlier run


def journal_folder(output: Path) -> Path:
    """Where the journal of an output lies. Raises BadInput for an output that is no name of a file."""
    if not output.name:
        raise BadInput(f"--output is {str(output)!r}, expected the name of a file")
    return output.with_name(f".{output.name}.journal")


def require_free(output: Path, overwrite: bool) -> None:
    """Raises OutputExists before long work for a file that is there, unless it is to be replaced, or to be finished."""
    if exists(output) and not (overwrite or journal_folder(output).exists()):
        raise OutputExists(output)


class Journal:
    """The record of one output. Use it as a context manager around everything that makes the output.

    Leaving the context normally removes the journal. An exception keeps it and the temporary files where the same
    command can go on: after an interruption, a full disk, a lost connection. Bad input removes all of it. Several
    threads may record what they have made.

    Args:
        output: the file or folder that is made; the journal lies beside it.
        fingerprint: everything that decides its bytes, under names and in values that a user understands. What is
            named by an absolute path counts only where both have it: a source may move.
        overwrite: discard the unfinished work of another fingerprint.
        progress: is told where the disk cannot keep other processes away, and what was damaged.
        keep_on_bad_input: bad input, which may be found late, does not remove what is done either; a complete output
            does.

    Raises BadInput when there is unfinished work of another fingerprint, when another process is writing the same
    output, or when the folder cannot be written.
    """

    def __init__(
        self,
        output: Path,
        fingerprint: Mapping[str, str],
        overwrite: bool = False,
        progress: Progress | None = None,
        keep_on_bad_input: bool = False,
    ) -> None:
        self.folder = journal_folder(output)
        self._output = output
        self._fingerprint = dict(fingerprint)
        self._precious = keep_on_bad_input
        self.progress = progress or NoProgress()
        self._started = time.monotonic()
        self._done: set[Key] = set()
        self._intact: dict[str, bool] = {}  # saved tensors that were looked at
        self._adding = threading.RLock()
        self._pending: list[Key] = []
        self._pending_bytes = 0
        self._unsynchronized: set[int] = set()
        self._committed = time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = open_descriptor(self.folder / "records", os.O_RDWR | os.O_CREAT)
            try:
                self._lock()
                self._continue(overwrite)
            except BaseException:
                os.close(self._descriptor)
                raise
        except BlockingIOError:
            raise BadInput(f"{output} is being written by another process: wait for it, or stop it") from None
        except OSError as error:
            raise BadInput(f"{self.folder} cannot be written: {error.strerror}; choose another --output") from None

    @property
    def earlier(self) -> Spent:
        """What earlier runs took; not all of a run counts that was killed, but what is recorded of it."""
        return self._earlier

    def done(self, kind: str) -> Iterator[Key]:
        """All that is done of one kind: the keys that begin with it."""
        return (key for key in self._done if key[0] == kind)

    def __contains__(self, key: Key) -> bool:
        """Whether this is done; what an earlier run did is durable too."""
        return key in self._done

    @property
    def continues(self) -> bool:
        """Whether something of the output was there from an earlier run, or has been made since."""
        return any(key[0] != STARTED for key in self._done)

    def start(self, temporary: Path) -> None:
        """Record that a temporary file is being made, so that it goes where the journal is not kept."""
        key = (STARTED, temporary.relative_to(self.folder.parent).as_posix())
        if key not in self._done:
            self.add(key)
            self.commit()

    @property
    def bytes_on_disk(self) -> int:
        """What the temporary files and everything beside the record take of the disk already."""
        temporary = (self.folder.parent / str(key[1]) for key in self.done(STARTED))
        files = (*temporary, *(path for path in self.folder.rglob("*") if path.is_file()))
        return sum(bytes_on_disk(path) for path in files if path.exists())

    def add(self, key: Key, size: int = 0, *descriptors: int) -> None:
        """Record that `key` is done: `size` bytes were written through `descriptors`. Makes batches durable."""
        with self._adding:
            self._done.add(key)
            self._pending.append(key)
            self._pending_bytes += size
            self._unsynchronized.update(descriptors)
            if self._pending_bytes >= BATCH_BYTES or time.monotonic() - self._committed >= BATCH_SECONDS:
                self.commit()

    def commit(self) -> None:
        """Make everything recorded so far durable. Raises Interrupted when the disk does not take it."""
        with self._adding:
            try:
                for descriptor in self._unsynchronized:
                    sync(descriptor)
                self._unsynchronized.clear()
                if self._pending:
                    spent = self._earlier + Spent.since(self._started)
                    self._append(sealed(entry(self._pending, spent), self._seed))
                    self._pending, self._pending_bytes = [], 0
            except OSError as error:
                raise self.stopped(error) from None
            self._committed = time.monotonic()

    def save(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Keep tensors under a name of letters, digits and hyphens, one at a time. They are durable at once, like all
        that was recorded before."""
        size = checksum = 0
        try:
            with (self.folder / name).open("wb") as file:
                for tensor in tensors:
                    array, header = tensor.numpy(), BytesIO()
                    npy.write_array_header_1_0(header, npy.header_data_from_array_1_0(array))
                    for part in (header.getvalue(), np.ascontiguousarray(array).data.cast("B")):
                        size, checksum = size + file.write(part), zlib.crc32(part, checksum)
                file.flush()
                sync(file.fileno())
            sync_folder(self.folder)
        except OSError as error:
            raise self.stopped(error) from None
        self._intact[name] = True
        self.add((SAVED, name, size, checksum))
        self.commit()

    def load(self, name: str) -> Iterator[Tensor]:
        """What was saved under a name, one at a time."""
        path, position = self.folder / name, 0
        while position < path.stat().st_size:
            with path.open("rb") as file:  # for one only, because Windows removes no open file
                file.seek(position)
                tensor = torch.from_numpy(np.load(file, allow_pickle=False))
                position = file.tell()
            yield tensor

    def holds(self, name: str) -> bool:
        """Whether something was saved under a name, completely, and is there as it was."""
        if name not in self._intact:
            recorded = [key[2:] for key in self._done if key[:2] == (SAVED, name)]
            self._intact[name] = bool(recorded) and _checksum(self.folder / name) in recorded
        return self._intact[name]

    def drop(self, name: str) -> None:
        """Remove what was saved under a name."""
        self._intact[name] = False
        (self.folder / name).unlink(missing_ok=True)

    def restart(self) -> None:
        """Discard what was done, and begin an empty record of this fingerprint. Raises OSError."""
        self._remove_temporaries()
        for path in self.folder.iterdir():
            if path.name != "records":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._done.clear()
        self._earlier, self._length = Spent(), 0
        header = sealed({"fingerprint": self._fingerprint, "version": __version__})
        self._seed = int(header[:8], 16)
        self._append(header * 2)  # because all depends on it
        sync_folder(self.folder)
        sync_folder(self.folder.parent)

    def stopped(self, error: OSError) -> Interrupted:
        """What to raise when the disk does not take what is written."""
        return Interrupted(
            f"{error.filename or self._output} cannot be written: {error.strerror}; "
            "free space and run the same command again, it continues where it stopped"
        )

    def keeps(self, error: BaseException) -> bool:
        """Whether the same command can go on after this error; if so, everything done is recorded."""
        refused = isinstance(error, OutputExists) or (isinstance(error, BadInput) and not self._precious)
        if refused or not self.continues:
            return False
        try:
            self.commit()
        except Interrupted:  # the last batch is lost, what was committed before is not
            self._pending.clear()
            self._unsynchronized.clear()
        return True

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        finished = error is None or not self.keeps(error)
        if finished:
            self._remove_temporaries()
            shutil.rmtree(self.folder, ignore_errors=True)
        remains = finished and self.folder.exists()
        os.close(self._descriptor)
        if remains:  # the record, which Windows does not remove while it is open
            shutil.rmtree(self.folder, ignore_errors=True)

    def _lock(self) -> None:
        """Keep other processes away. Raises BlockingIOError when one is at work here."""
        if not lock(self._descriptor):
            line = f"{self.folder} is on a disk that cannot lock files: start nothing else that writes there"
            self.progress.note(line)
        elif not os.fstat(self._descriptor).st_nlink:  # it was just finishing, and has removed the record
            raise BlockingIOError

    def _continue(self, overwrite: bool) -> None:
        """Read the record, and begin anew where it is of no use."""
        content = bytearray(os.fstat(self._descriptor).st_size)
        read_at(self._descriptor, memoryview(content), 0)
        record = read_record(bytes(content))
        self._done, self._earlier = record.done, record.spent
        self._seed, self._length = record.seed, record.length
        if record.damaged:
            damaged = "1 line is" if record.damaged == 1 else f"{record.damaged} lines are"
            self.progress.note(f"{self.folder / 'records'}: {damaged} damaged; what is recorded there is done again")
        found, version = _described(record.header or {})
        changes = self._changes(found)
        if not changes:
            return
        if self.continues and not overwrite:
            raise BadInput(self._refusal(changes, version))
        self.restart()

    def _append(self, line: bytes) -> None:
        """Write a line behind the last whole one, and make it durable."""
        os.ftruncate(self._descriptor, self._length)
        write_at(self._descriptor, memoryview(line), self._length)
        sync(self._descriptor)
        self._length += len(line)

    def _remove_temporaries(self) -> None:
        for key in self.done(STARTED):
            with suppress(OSError):
                self.folder.parent.joinpath(str(key[1])).unlink(missing_ok=True)

    def _changes(self, found: Mapping[str, str]) -> list[str]:
        """What differs from the fingerprint that was found."""
        return [*differences(found, self._fingerprint).values()]

    def _refusal(self, changes: Sequence[str], version: str) -> str:
        further = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        other = f" with moecast {version}" if version != __version__ else ""
        return (
            f"{'; '.join(changes[:_SHOWN])}{further}: {self.folder} holds unfinished work of another conversion; run "
            f"that one again{other} to finish it, or use --overwrite to begin anew"
        )


def _described(header: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """A header's fingerprint and version."""
    fingerprint = header.get("fingerprint")
    facts = fingerprint.items() if isinstance(fingerprint, dict) else ()
    return {name: str(value) for name, value in facts}, str(header.get("version"))


def _checksum(path: Path) -> tuple[int, int] | None:
    """A file's size and CRC-32, None where it is gone or cannot be read."""
    size = checksum = 0
    try:
        with path.open("rb") as file:
            while part := file.read(_READ):
                size, checksum = size + len(part), zlib.crc32(part, checksum)
    except OSError:
        return None
    return size, checksum
