"""Retries and progress of downloads, which the Hub's client leaves to its callers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import httpx2
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import silent_tqdm

from ...progress import NoProgress, Progress

ATTEMPTS = 5

Result = TypeVar("Result")


class Stopped(Exception):
    """Another download failed, or the user interrupts."""


class Meter:
    """Adds up the bytes of parallel downloads, and stops them all."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.stopped = threading.Event()
        self._progress = progress or NoProgress()
        self._done: dict[str, int] = {}
        self._lock = threading.Lock()
        self._progress.begin("Fetching", total, "bytes")

    def set(self, file: str, done: int) -> None:
        if self.stopped.is_set():
            raise Stopped
        with self._lock:
            self._progress.advance(done - self._done.get(file, 0), file)
            self._done[file] = done


class Bar(silent_tqdm):
    """What the client takes for a progress bar."""

    def __init__(self, meter: Meter, file: str, initial: int = 0, **_: object) -> None:
        self._meter, self._file, self._done = meter, file, initial

    def update(self, n: float | None = 1) -> None:
        self._done += int(n or 0)
        self._meter.set(self._file, self._done)


def retried(action: Callable[[], Result], reached: Callable[[], int] = lambda: 0) -> Result:
    """Repeats what the client gives up on; growth of `reached` shows that the connection is worth more patience."""
    attempt, best = 0, reached()
    while True:
        try:
            return action()
        except (HfHubHTTPError, httpx2.ReadError, httpx2.ReadTimeout, httpx2.RemoteProtocolError) as error:
            if reached() > best:
                attempt, best = 0, reached()
            asked = _wait_asked_for(error.response) if isinstance(error, HfHubHTTPError) else 0
            if attempt == ATTEMPTS or asked is None:
                raise
            time.sleep(max(2**attempt, asked))
            attempt += 1


def _wait_asked_for(response: httpx2.Response) -> int | None:
    """Seconds until a request may be repeated; None where that is of no use."""
    if response.status_code not in (408, 429) and response.status_code < 500:
        return None
    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return int(limit.reset_in_seconds)
    seconds = response.headers.get("Retry-After", "")
    return int(seconds) if seconds.isdigit() else 0
