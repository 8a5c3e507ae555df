"""Each way of doing what systems do differently gives the same result, and whole conversions give the same bytes."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import pytest
from moecast import files

ELSEWHERE = Path(__file__).with_name("elsewhere.py")
CONTENT = bytes(range(256)) * 40


@pytest.fixture(params=["this system", "another"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """This one, and one that lacks the better calls."""
    if request.param == "another":
        for name in ("preadv", "pwrite", "posix_fallocate", "fdatasync"):
            monkeypatch.delattr(os, name)
    return str(request.param)


@pytest.fixture
def descriptor(tmp_path: Path) -> Any:
    number = files.open_descriptor(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield number
    os.close(number)


def test_reading_and_writing(system: str, descriptor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces that do not divide the whole, at any position, to the end and beyond."""
    monkeypatch.setattr(files, "_MOST", 1000)
    assert files.write_at(descriptor, memoryview(CONTENT), 7) == len(CONTENT)
    assert (tmp_path / "file").read_bytes() == bytes(7) + CONTENT
    inside, beyond = bytearray(3001), bytearray(3001)
    assert files.read_at(descriptor, memoryview(inside), 4000) and inside == (bytes(7) + CONTENT)[4000:7001]
    assert not files.read_at(descriptor, memoryview(beyond), len(CONTENT))
    assert files.write_at(descriptor, memoryview(b""), 0) == 0 and files.read_at(descriptor, memoryview(bytearray()), 0)


def test_threads_share_a_descriptor(system: str, descriptor: int) -> None:
    """The position of a file is one for all threads, so nobody may come between moving it and using it."""

    def own_place(number: int) -> bool:
        expected = bytes([number]) * 100
        for _ in range(50):
            files.write_at(descriptor, memoryview(expected), 100 * number)
            found = bytearray(100)
            if not files.read_at(descriptor, memoryview(found), 100 * number) or found != expected:
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(own_place, range(8)))


def test_reserving(system: str, descriptor: int, tmp_path: Path) -> None:
    os.write(descriptor, b"content")
    for size, length in ((5000, 5000), (10, 5000), (5001, 5001)):
        files.reserve(descriptor, size)
        assert (tmp_path / "file").stat().st_size == length
    assert (tmp_path / "file").read_bytes() == b"content" + bytes(4994)


def test_reserving_without_room(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with holes would find out only when they are filled; a disk that cannot reserve is no failure."""

    def refusing(reason: int) -> Callable[..., None]:
        def refuse(*arguments: int) -> None:
            raise OSError(reason, os.strerror(reason))

        return refuse

    monkeypatch.setattr(os, "posix_fallocate", refusing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        files.reserve(descriptor, 5000)
    monkeypatch.setattr(os, "posix_fallocate", refusing(errno.EOPNOTSUPP))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fstatvfs", lambda _: SimpleNamespace(f_bavail=4, f_frsize=1024))
        with pytest.raises(OSError, match="No space left"):
            files.reserve(descriptor, 5000)
        files.reserve(descriptor, 4096)
    monkeypatch.delattr(os, "fstatvfs")
    files.reserve(descriptor, 5000)
    assert os.fstat(descriptor).st_size == 5000


def test_synchronising(descriptor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The strongest call that there is: macOS's own, which network disks refuse, fdatasync, fsync."""
    called: list[str] = []
    monkeypatch.setattr(os, "fdatasync", lambda _: called.append("fdatasync"))
    monkeypatch.setattr(os, "fsync", lambda _: called.append("fsync"))
    files.sync(descriptor)
    monkeypatch.delattr(os, "fdatasync")
    files.sync(descriptor)
    macos = SimpleNamespace(F_FULLFSYNC=51, fcntl=lambda _, command: called.append(f"fcntl {command}"))
    monkeypatch.setattr(files, "fcntl", macos)
    files.sync(descriptor)

    def refuse(*arguments: int) -> None:
        raise OSError(errno.ENOTSUP, "not here")

    macos.fcntl = refuse
    files.sync(descriptor)
    files.sync_folder(tmp_path)
    monkeypatch.delattr(os, "O_DIRECTORY")
    files.sync_folder(tmp_path)
    assert called == ["fdatasync", "fsync", "fcntl 51", "fsync", "fsync"]


class Msvcrt:
    """Locks bytes for the descriptor that asks first, as Windows does."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        self.locked: dict[tuple[int, int], int] = {}

    def locking(self, descriptor: int, mode: int, count: int) -> None:
        place = os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
        if self.locked.setdefault(place, descriptor) != descriptor:
            raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("windows", [False, True])
def test_locking(descriptor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows: bool) -> None:
    if windows:
        monkeypatch.setattr(files, "fcntl", None)
        monkeypatch.setattr(files, "msvcrt", Msvcrt())
    second = files.open_descriptor(tmp_path / "file", os.O_RDWR)
    assert files.lock(descriptor)
    with pytest.raises(BlockingIOError):
        files.lock(second)
    os.close(second)
    assert files.lock(descriptor)


def test_disks_that_cannot_lock(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "fcntl", SimpleNamespace(LOCK_EX=2, LOCK_NB=4, flock=refuse))
    assert not files.lock(descriptor)
    monkeypatch.setattr(files, "fcntl", None)
    assert not files.lock(descriptor)


def test_memory_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux says what is in use and its peak; getrusage knows the peak, in kilobytes or, on macOS, bytes."""
    block = bytearray(os.urandom(1 << 10)) * (200 << 10)
    peak, now = files.peak_rss_bytes(), files.rss_bytes()
    assert peak >= now > len(block) and files.memory_bytes() > peak
    monkeypatch.setattr(files, "_PROCESS", Path("/nowhere"))
    assert files.rss_bytes() == files.peak_rss_bytes() >= now
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: SimpleNamespace(ru_maxrss=5000))
    monkeypatch.setattr(files, "resource", usage)
    assert files.peak_rss_bytes() == 5000 << 10
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(sysname="Darwin"))
    assert files.peak_rss_bytes() == 5000
    monkeypatch.setattr(files, "resource", None)
    assert files.peak_rss_bytes() == files.rss_bytes() == 0
    monkeypatch.delattr(os, "sysconf")
    assert files.memory_bytes() == 0


def test_memory_in_use_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Structures as Microsoft lays them out: the peak of the working set at byte 8, its size behind it."""

    def process(this: ctypes.c_void_p, counters: Any, size: int) -> int:
        assert size == 72 and ctypes.c_uint32.from_address(ctypes.addressof(counters._obj)).value == 72
        ctypes.memmove(ctypes.addressof(counters._obj) + 8, (ctypes.c_uint64 * 2)(3000, 2000), 16)
        return 1

    def machine(status: Any) -> int:
        assert ctypes.c_uint32.from_address(ctypes.addressof(status._obj)).value == 64
        ctypes.memmove(ctypes.addressof(status._obj) + 8, ctypes.byref(ctypes.c_uint64(4000)), 8)
        return 1

    kernel = SimpleNamespace(K32GetProcessMemoryInfo=process, GlobalMemoryStatusEx=machine)
    monkeypatch.setattr(files, "_windows", SimpleNamespace(kernel32=kernel))
    monkeypatch.setattr(files, "_PROCESS", Path("/nowhere"))
    monkeypatch.setattr(files, "resource", None)
    monkeypatch.delattr(os, "sysconf")
    assert (files.peak_rss_bytes(), files.rss_bytes(), files.memory_bytes()) == (3000, 2000, 4000)


def test_bytes_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    os.truncate(path, 1 << 30)
    assert len(CONTENT) <= files.bytes_on_disk(path) < 1 << 20
    monkeypatch.setattr(Path, "stat", lambda _: SimpleNamespace(st_size=77))
    assert files.bytes_on_disk(path) == 77


def test_open_files_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "resource", None)
    files.allow_open_files(8192)


def test_every_module_can_be_imported_elsewhere() -> None:
    code = (
        "import elsewhere, importlib, pkgutil\n"
        "elsewhere.become_another_system()\n"
        "import moecast\n"
        "outside = {'setup', '_kernels'}  # run by pip, and no module\n"
        "names = [m.name for m in pkgutil.walk_packages(moecast.__path__, 'moecast.')]\n"
        "names = [name for name in names if name.split('.')[-1] not in outside]\n"
        "for name in names: importlib.import_module(name)\n"
        "print(len(names))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ELSEWHERE.parent, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 90


def _convert(system: str, folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """Every file that conversions leave, and what they noted."""
    text = folder.with_name("text.txt")
    text.write_text(checkpoints.TEXT.read_text(encoding="utf-8")[:1200], encoding="utf-8")
    arguments = [system, str(checkpoints.EXAMPLES / "minimax-m2-tiny"), str(text), str(folder)]
    result = subprocess.run([sys.executable, str(ELSEWHERE), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    made = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return made, json.loads(result.stdout)


@pytest.mark.slow
def test_conversions_give_the_same_bytes_elsewhere(tmp_path: Path) -> None:
    """GGUF and ONNX; calibrated, on disk, stopped and resumed."""
    here, notes = _convert("this", tmp_path / "here")
    there, other_notes = _convert("other", tmp_path / "there")
    assert here == there and {"plain.gguf", "calibrated.gguf", "i.gguf"} < here.keys()
    assert not any(Path(name).name.startswith(".") for name in here)
    cannot_lock = "is on a disk that cannot lock files: start nothing else that writes there"
    assert sum(cannot_lock in note for note in other_notes) == 4
    assert not any(cannot_lock in note for note in notes)
    for noted in (notes, other_notes):
        assert any(note.startswith("Resuming") for note in noted[noted.index("stopped") :])
