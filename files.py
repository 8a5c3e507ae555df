"""What differs between Linux, macOS and Windows: reading, writing, locking and reserving files, and memory in use.

Every function chooses by what the system offers at the moment, the best first, with the same result.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any


def _module(name: str) -> Any:
    """A module that not every system has, or None."""
    try:
        return import_module(name)
    except ImportError:
        return None


fcntl, msvcrt, resource = _module("fcntl"), _module("msvcrt"), _module("resource")
_windows = getattr(ctypes, "windll", None)
_PROCESS = Path("/proc/self/status")
_MOST = 1 << 30  # bytes of one system call; macOS refuses those of more than 2^31
_LOCKED_BYTE = 1 << 30  # beyond the content, because what Windows locks cannot be read either
_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_position = threading.Lock()  # held while a file's position counts


def open_descriptor(path: Path | str, flags: int = os.O_RDONLY) -> int:
    """As `os.open`, whose bytes Windows would take for lines of text. Raises OSError."""
    return os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)


def read_at(descriptor: int, into: memoryview, position: int) -> bool:
    """Fill contiguous memory with the bytes at a position of a file; False when it ends before that. Raises OSError."""
    view, done = into.cast("B"), 0
    while done < len(view):
        piece = view[done : done + _MOST]
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [piece], position + done)
        else:
            with _position:
                os.lseek(descriptor, position + done, os.SEEK_SET)
                read = os.read(descriptor, len(piece))
            count = len(read)
            piece[:count] = read
        if count == 0:
            return False
        done += count
    return True


def write_at(descriptor: int, values: memoryview, position: int) -> int:
    """Put contiguous memory at a position of a file, and return how many bytes that is. Raises OSError."""
    view, done = values.cast("B"), 0
    while done < len(view):
        piece = view[done : done + _MOST]
        if hasattr(os, "pwrite"):
            done += os.pwrite(descriptor, piece, position + done)
        else:
            with _position:
                os.lseek(descriptor, position + done, os.SEEK_SET)
                done += os.write(descriptor, piece)
    return done


def reserve(descriptor: int, size: int) -> None:
    """Make a file at least so long. Raises OSError where the disk has no room for it."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a kind of disk that cannot reserve
                raise
    missing = size - os.fstat(descriptor).st_size
    if hasattr(os, "fstatvfs"):  # the new part will be a hole, which any disk has room for
        disk = os.fstatvfs(descriptor)
        if disk.f_bavail * disk.f_frsize < missing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if missing > 0:
        os.ftruncate(descriptor, size)


def sync(descriptor: int) -> None:
    """Make what was written to a file survive a power cut. Raises OSError."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS, where fsync leaves data in the drive's cache
        with suppress(OSError):  # a network disk has none
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    getattr(os, "fdatasync", os.fsync)(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut; Windows sees to that itself. Raises OSError."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Put text in a file that is there with all of it or not at all, in place of an earlier one. Raises OSError."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            sync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def lock(descriptor: int) -> bool:
    """Keep other processes from locking a file while it is open here; False where the system cannot, as on some
    network disks. Raises BlockingIOError when another has locked it."""
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt:
            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in _TAKEN:
            raise BlockingIOError(error.errno, os.strerror(error.errno)) from None
        return False
    return bool(fcntl or msvcrt)


def cache_folder() -> Path:
    """Where this system's users keep what programs can make again; it need not be there yet."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local", "moecast", "Cache")
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/moecast"
    named = os.environ.get("XDG_CACHE_HOME", "")
    return Path(named if os.path.isabs(named) else Path.home() / ".cache", "moecast")


def bytes_on_disk(path: Path) -> int:
    """What a file takes of the disk: without its holes, where the system tells."""
    status = path.stat()
    return status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size


def allow_open_files(count: int) -> None:
    """Let this process have so many files open, or as many as it may; a shell's default is a few hundred."""
    if resource is None:  # Windows allows 8192 from the start
        return
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if most == resource.RLIM_INFINITY else min(count, most)
    if allowed != resource.RLIM_INFINITY and allowed < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far; 0 where the system does not tell."""
    with suppress(OSError):  # first, because getrusage counts the parent that forked us as well
        return _status("VmHWM")
    if resource is None:
        return _windows_memory(0)
    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def rss_bytes() -> int:
    """The resident memory of this process, without what the C library keeps of what was freed; where the system does
    not tell, the largest so far."""
    with suppress(AttributeError, OSError, TypeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        return _status("VmRSS")
    return _windows_memory(1) or peak_rss_bytes()


def memory_bytes() -> int:
    """The memory of this machine; 0 where the system does not tell."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if _windows is None:
        return 0
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    _windows.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status.numbers[0])


def _status(key: str) -> int:
    return int(_PROCESS.read_text().partition(f"{key}:")[2].split()[0]) * 1024


def _windows_memory(number: int) -> int:
    """One of the numbers that Windows knows of this process; 0 elsewhere."""
    if _windows is None:
        return 0
    counters = _ProcessMemory(length=ctypes.sizeof(_ProcessMemory))
    this = ctypes.c_void_p(-1)
    _windows.kernel32.K32GetProcessMemoryInfo(this, ctypes.byref(counters), ctypes.sizeof(counters))
    return int(counters.numbers[number])


class _ProcessMemory(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of Windows; its numbers begin with the peak of the working set and its size now."""

    _fields_ = (("length", ctypes.c_uint32), ("faults", ctypes.c_uint32), ("numbers", ctypes.c_size_t * 8))


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of Windows; its numbers begin with the size of the physical memory."""

    _fields_ = (("length", ctypes.c_uint32), ("load", ctypes.c_uint32), ("numbers", ctypes.c_uint64 * 7))
