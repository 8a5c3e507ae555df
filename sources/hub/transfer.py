"""Patience for what depends on a network: tries and pauses that are bounded and said, waits that end at once."""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import httpx2
from huggingface_hub.errors import HfHubHTTPError

from ...errors import Interrupted
from ...progress import NoProgress, Progress

ATTEMPTS = 5
LONGEST_PAUSE = 300  # seconds that a server may ask for before a request is repeated
LONGEST_SILENCE = 60.0  # seconds without a sign of life, pauses that were announced left out
WORTH_PATIENCE = 1 << 15  # bytes; what has brought as many deserves all attempts anew
_LOOK = 0.2  # seconds between two looks at whether a wait is over

Item = TypeVar("Item")
Result = TypeVar("Result")


class Stopped(Exception):
    """Another download failed, or the user interrupts."""


class Watch:
    """What those who wait for a network share: any of them can be stopped, and it shows whether anything moves.

    `notes` hears what is waited for.
    """

    def __init__(self, notes: Progress | None = None) -> None:
        self.stopped = threading.Event()
        self.notes = notes or NoProgress()
        self._heard = time.monotonic()

    def alive(self) -> None:
        """Something moves. Raises Stopped when nobody waits for it any more."""
        self._heard = max(self._heard, time.monotonic())
        self.require_wanted()

    def require_wanted(self) -> None:
        """Raises Stopped when nobody waits for a result any more."""
        if self.stopped.is_set():
            raise Stopped

    def pause(self, seconds: float) -> None:
        """Wait, and end at once when stopped. Raises Stopped."""
        self._heard = time.monotonic() + seconds
        if self.stopped.wait(seconds):
            raise Stopped

    def follow(self, other: Watch) -> None:
        """What moves there counts here too."""
        self._heard = max(self._heard, other._heard)

    def require_life(self, what: str) -> None:
        """Raises Interrupted when nothing has moved for too long, wherever it hangs."""
        if time.monotonic() - self._heard > LONGEST_SILENCE:
            raise Interrupted(
                f"nothing has come from {what} for {LONGEST_SILENCE:.0f} seconds: check the network and run the same "
                "again, it will resume"
            )


class Meter(Watch):
    """Adds up the bytes of parallel downloads, and stops them all."""

    def __init__(self, progress: Progress | None, total: int, notes: Progress | None = None) -> None:
        super().__init__(notes or progress)
        self._progress = progress or NoProgress()
        self._done: dict[str, int] = {}
        self._lock = threading.Lock()
        self._progress.begin("Fetching", total, "bytes")

    def set(self, file: str, done: int) -> None:
        self.alive()
        with self._lock:
            self._progress.advance(done - self._done.get(file, 0), file)
            self._done[file] = done


def in_parallel(
    action: Callable[[Item], Result], items: Iterable[Item], threads: int, watch: Watch, what: str
) -> list[Result]:
    """Results of an action for each item, in order. The first error stops all and is raised, as is an interrupt.

    The threads are daemons that nobody joins: one that hangs in the network keeps no program from ending.
    """
    left: queue.SimpleQueue[tuple[int, Item]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Result | None, BaseException | None]] = queue.SimpleQueue()
    count = 0
    for count, item in enumerate(items, 1):
        left.put((count - 1, item))

    def work() -> None:
        while not watch.stopped.is_set():
            try:
                number, item = left.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((number, action(item), None))
            except BaseException as error:
                done.put((number, None, error))

    for _ in range(min(threads, count)):
        threading.Thread(target=work, daemon=True).start()
    results: dict[int, Result] = {}
    try:
        while len(results) < count:
            try:
                number, result, error = done.get(timeout=_LOOK)
            except queue.Empty:
                watch.require_life(what)
                continue
            if error is not None:
                raise error
            results[number] = result  # type: ignore[assignment]
    except BaseException:
        watch.stopped.set()
        raise
    return [results[number] for number in range(count)]


class Retries:
    """Repeats what fails for reasons that pass, with growing pauses. Once the Hub has answered, so is connecting."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._answered = False

    def run(self, action: Callable[[], Result], watch: Watch, reached: Callable[[], int] = lambda: 0) -> Result:
        """What the action gives in the end; growth of `reached` shows that the connection is worth more patience.

        Raises Interrupted for a pause that is longer than anybody should wait, Stopped when nobody waits any more, else
        what the action has raised last.
        """
        attempt, best = 0, reached()
        while True:
            watch.require_wanted()
            try:
                result = action()
                self._answered = True
                return result
            except (HfHubHTTPError, httpx2.TransportError) as error:
                watch.require_wanted()  # no word of another try after the error that ended everything
                if reached() >= best + WORTH_PATIENCE:
                    attempt, best = 0, reached()
                asked = self._pause_after(error)
                if attempt == ATTEMPTS or asked is None:
                    raise
                self._pause(max(2**attempt, asked), error, watch)
                attempt += 1

    def _pause(self, seconds: int, error: Exception, watch: Watch) -> None:
        if seconds > LONGEST_PAUSE:
            raise Interrupted(
                f"{self._endpoint} asks to wait {seconds} seconds: run the same again after that, it will resume"
            ) from error
        what = str(error.response.status_code) if isinstance(error, HfHubHTTPError) else type(error).__name__
        watch.notes.note(f"{self._endpoint}: {what}; trying again in {seconds} s")
        watch.pause(seconds)

    def _pause_after(self, error: HfHubHTTPError | httpx2.TransportError) -> int | None:
        """Seconds that were asked for; None where another try is of no use."""
        if isinstance(error, HfHubHTTPError):
            return _pause_asked_for(error.response)
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            return 0 if self._answered else None
        return (
            0 if isinstance(error, httpx2.NetworkError | httpx2.TimeoutException | httpx2.RemoteProtocolError) else None
        )


def _pause_asked_for(response: httpx2.Response) -> int | None:
    """Seconds until a request may be repeated; None where that is of no use."""
    if response.status_code not in (408, 429) and response.status_code < 500:
        return None
    limit = re.search(r";\s*r\s*=\s*0+\s*;\s*t\s*=\s*([0-9]+)", response.headers.get("RateLimit", "")[:1000])
    asked = re.fullmatch(r"[0-9]+", response.headers.get("Retry-After", "").strip()[:1000])
    digits = limit[1] if limit else asked[0] if asked else "0"
    return int(digits[:9])  # a number of more digits is too large in any case
