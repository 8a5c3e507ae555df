"""Write-ahead journal of one output: lists the pieces that are durable on disk, so that an interrupted run resumes.

Beside an output NAME lies the folder `.NAME.journal` with the file `records` and tensors saved on the way. The first
line of `records` is the fingerprint of what is made; each further line lists keys of what has become durable since.
Data are synchronized before the line that names them is written, so no line promises what a power cut could take back.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePath
from types import TracebackType

import numpy as np
import numpy.lib.format as npy
import torch
from torch import Tensor

from ... import __version__
from ...errors import BadInput, Interrupted, OutputExists
from ...files import bytes_on_disk, lock, open_descriptor, read_at, sync, sync_folder, write_at
from ...progress import NoProgress, Progress

BATCH_BYTES = 256 << 20  # this much is written before it is made durable
BATCH_SECONDS = 2.0  # or for this long

Key = tuple[str | int, ...]
_STARTED = "started"  # first part of the keys that name temporary files
_VERSION = "version"  # what the record says beside the fingerprint, for people


def _is_sound(key: object) -> bool:
    """Whether a record can be trusted with what follows from it: files that were started are removed by their names."""
    if not isinstance(key, list) or not all(isinstance(part, str | int) for part in key) or not key:
        return False
    return key[0] != _STARTED or (len(key) == 3 and _is_part(key[1]) and isinstance(key[2], int))


def _is_part(name: object) -> bool:
    """Whether a record names a file in the making beside the journal; outputs may be called what the system allows."""
    if not isinstance(name, str):
        return False
    path = PurePath(name)
    return not path.anchor and ".." not in path.parts and path.name.startswith(".") and path.name.endswith(".part")


def journal_folder(output: Path) -> Path:
    """Where the journal of an output lies. Raises BadInput for an output that is no name of a file."""
    if not output.name:
        raise BadInput(f"--output is {str(output)!r}, expected the name of a file")
    return output.with_name(f".{output.name}.journal")


class Journal:
    """The record of one output. Use it as a context manager around everything that makes the output.

    Leaving the context normally removes the journal. An exception keeps it and the temporary files where the same
    command can go on: after an interruption, a full disk, a lost connection. Bad input removes all of it.

    Args:
        output: the file or folder that is made; the journal lies beside it.
        fingerprint: everything that decides its bytes, under names and in values that a user understands.
        overwrite: discard the unfinished work of another fingerprint.
        progress: is told where the disk cannot keep other processes away.
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
        self._done: set[Key] = set()
        self._pending: list[Key] = []
        self._pending_bytes = 0
        self._unsynchronized: set[int] = set()
        self._committed = time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = open_descriptor(self.folder / "records", os.O_RDWR | os.O_CREAT)
            try:
                self._lock(progress or NoProgress())
                self._continue(overwrite)
            except BaseException:
                os.close(self._descriptor)
                raise
        except BlockingIOError:
            raise BadInput(f"{output} is being written by another process: wait for it, or stop it") from None
        except OSError as error:
            raise BadInput(f"{self.folder} cannot be written: {error.strerror}; choose another --output") from None

    def done(self, kind: str) -> Iterator[Key]:
        """All that is done of one kind: the keys that begin with it."""
        return (key for key in self._done if key[0] == kind)

    def __contains__(self, key: Key) -> bool:
        """Whether this is done; what an earlier run did is durable too."""
        return key in self._done

    @property
    def continues(self) -> bool:
        """Whether something of the output was there from an earlier run, or has been made since."""
        return any(key[0] != _STARTED for key in self._done)

    def start(self, temporary: Path) -> None:
        """Record that a temporary file has its final size and can be filled. It goes where the journal is not kept."""
        self.add((_STARTED, self._relative(temporary), temporary.stat().st_size))
        self.commit()

    def started(self, temporary: Path) -> bool:
        """Whether an earlier run has started this file. Raises BadInput when it is not as that run left it."""
        name = self._relative(temporary)
        size = next((key[2] for key in self._done if key[:2] == (_STARTED, name)), None)
        if size is not None and not (temporary.is_file() and temporary.stat().st_size == size):
            raise BadInput(f"{temporary} was removed or changed, so what it held is lost: run the command again")
        return size is not None

    @property
    def bytes_on_disk(self) -> int:
        """What the temporary files and everything beside the record take of the disk already."""
        temporary = (self.folder.parent / str(key[1]) for key in self.done(_STARTED))
        files = (*temporary, *(path for path in self.folder.rglob("*") if path.is_file()))
        return sum(bytes_on_disk(path) for path in files if path.exists())

    def add(self, key: Key, size: int = 0, *descriptors: int) -> None:
        """Record that `key` is done: `size` bytes were written through `descriptors`. Makes batches durable."""
        self._done.add(key)
        self._pending.append(key)
        self._pending_bytes += size
        self._unsynchronized.update(descriptors)
        if self._pending_bytes >= BATCH_BYTES or time.monotonic() - self._committed >= BATCH_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make everything recorded so far durable. Raises Interrupted when the disk does not take it."""
        try:
            for descriptor in self._unsynchronized:
                sync(descriptor)
            self._unsynchronized.clear()
            if self._pending:
                self._append(self._pending)
                self._pending, self._pending_bytes = [], 0
        except OSError as error:
            raise self.stopped(error) from None
        self._committed = time.monotonic()

    def save(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Keep tensors under a name, one at a time. They are durable at once, like all that was recorded before."""
        try:
            with (self.folder / name).open("wb") as file:
                for tensor in tensors:
                    array = tensor.numpy()
                    npy.write_array_header_1_0(file, npy.header_data_from_array_1_0(array))
                    file.write(np.ascontiguousarray(array).data)  # np.save would not say why a disk refuses
                file.flush()
                sync(file.fileno())
            sync_folder(self.folder)
        except OSError as error:
            raise self.stopped(error) from None
        self.add(("saved", name))
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
        """Whether something was saved under a name, completely, and is still there."""
        return ("saved", name) in self._done and (self.folder / name).is_file()

    def drop(self, name: str) -> None:
        """Remove what was saved under a name."""
        (self.folder / name).unlink(missing_ok=True)

    def restart(self) -> None:
        """Discard what was done, and begin an empty record of this fingerprint. Raises OSError."""
        self._remove_temporaries()
        for path in self.folder.iterdir():
            if path.name != "records":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._done.clear()
        self._length = 0
        self._append(self._fingerprint | {_VERSION: __version__})
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

    def _lock(self, progress: Progress) -> None:
        """Keep other processes away. Raises BlockingIOError when one is at work here."""
        if not lock(self._descriptor):
            progress.note(f"{self.folder} is on a disk that cannot lock files: start nothing else that writes there")
        elif not os.fstat(self._descriptor).st_nlink:  # it was just finishing, and has removed the record
            raise BlockingIOError

    def _continue(self, overwrite: bool) -> None:
        """Read the record, and begin anew where it is of no use."""
        found = self._read()
        version = found.pop(_VERSION, None)
        if found == self._fingerprint:
            return
        if self.continues and not overwrite:
            raise BadInput(self._difference(found, version))
        self.restart()

    def _read(self) -> dict[str, str]:
        """The fingerprint of the record; its keys become what is done, up to the first line that is not whole."""
        content = bytearray(os.fstat(self._descriptor).st_size)
        read_at(self._descriptor, memoryview(content), 0)
        fingerprint: dict[str, str] = {}
        self._length = 0
        for number, line in enumerate(content.splitlines(keepends=True)):
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                value = None
            if number and isinstance(value, list) and all(_is_sound(key) for key in value):
                self._done.update(tuple(key) for key in value)
            elif not number and isinstance(value, dict):
                fingerprint = value
            else:
                break
            self._length += len(line)
        return fingerprint

    def _append(self, value: object) -> None:
        """Write one line behind the last whole one, and make it durable."""
        line = json.dumps(value, separators=(",", ":")).encode() + b"\n"
        os.ftruncate(self._descriptor, self._length)
        write_at(self._descriptor, memoryview(line), self._length)
        sync(self._descriptor)
        self._length += len(line)

    def _relative(self, temporary: Path) -> str:
        return temporary.relative_to(self.folder.parent).as_posix()

    def _remove_temporaries(self) -> None:
        for key in self.done(_STARTED):
            with suppress(OSError):
                self.folder.parent.joinpath(str(key[1])).unlink(missing_ok=True)

    def _difference(self, found: Mapping[str, str], version: str | None) -> str:
        names = dict.fromkeys((*self._fingerprint, *found))
        changes = "; ".join(
            f"{name} was {found.get(name)}, is now {self._fingerprint.get(name)}"
            for name in names
            if found.get(name) != self._fingerprint.get(name)
        )
        other = f" with moecast {version}" if version not in (None, __version__) else ""
        return (
            f"{changes}: {self.folder} holds unfinished work of another conversion; run that one again{other} to "
            "finish it, or use --overwrite to begin anew"
        )
