"""Requests to one Hub, bounded in bytes, speed, pages and hosts.

huggingface_hub gives the session and the errors. Its own requests wait as long as a server asks, keep
whatever it sends, expand what it has compressed, and follow a listing to other hosts, token in hand.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]

from ... import __version__
from ...documents import parse_json
from ...errors import BadInput, Interrupted
from .transfer import Retries, Watch

TIMEOUT = 10.0  # seconds without a byte
SLOWEST = 4096  # bytes a second, below which the connection is made anew
WINDOW = 30.0  # seconds over which speed is measured
MOST_PAGES = 1000  # of a listing, a thousand files each
_MOST_JSON = 64 << 20  # bytes of one answer
_MOST_REDIRECTS = 10


class Connection:
    """Sends requests to `endpoint`, and `token` to no other host."""

    def __init__(self, endpoint: str, token: str | None) -> None:
        self.endpoint = endpoint
        self.retries = Retries(endpoint)
        # Compressed answers could neither be resumed nor bounded. The client's own headers would cost a request.
        self._anonymous = {"User-Agent": f"moecast/{__version__}", "Accept-Encoding": "identity"}
        self._known = self._anonymous | ({"Authorization": f"Bearer {token}"} if token else {})

    def read_json(self, address: str, watch: Watch) -> Any:
        """The answer to a GET as JSON. Raises Interrupted and what the client raises."""
        return self._read_json(address, watch)[0]

    def read_pages(self, address: str, watch: Watch) -> Iterator[Any]:
        """The pages of a listing, each as JSON."""
        following: str | None = address
        for _ in range(MOST_PAGES):
            if following is None:
                return
            page, following = self._read_json(following, watch)
            yield page
        if following is not None:
            raise Interrupted(f"{self.endpoint} lists more than {MOST_PAGES} pages of files: a mirror may be at fault")

    def read_range(self, address: str, start: int, stop: int, watch: Watch) -> bytes:
        """Bytes `start` to `stop` of a file; fewer where it ends."""

        def read() -> bytes:
            return b"".join(self._receive(address, f"bytes={start}-{stop - 1}", start, stop - start, watch))

        return self.retries.run(read, watch)

    def receive(self, address: str, start: int, size: int, watch: Watch) -> Generator[bytes, None, None]:
        """A file of `size` bytes from `start` on, as it comes and never more. Raises what the client raises."""
        return self._receive(address, f"bytes={start}-" if start else None, start, size - start, watch)

    def _receive(
        self, address: str, part: str | None, start: int, most: int, watch: Watch
    ) -> Generator[bytes, None, None]:
        with self._answer(address, {"Range": part} if part else {}) as response:
            if start and response.status_code != 206:
                raise RangeIgnored("the server sends the file from its start")
            if response.status_code == 206 and not response.headers.get("Content-Range", "").startswith(
                f"bytes {start}-"
            ):
                raise httpx2.RemoteProtocolError("the server sends another part than was asked for")
            yield from _bounded(response, most, watch)

    def _read_json(self, address: str, watch: Watch) -> tuple[Any, str | None]:
        """An answer as JSON, and the address of the page that follows it."""

        def read() -> tuple[Any, str | None]:
            with self._answer(address, {}) as response:
                content = b"".join(_bounded(response, _MOST_JSON + 1, watch))
                following = response.links.get("next", {}).get("url")
                return content, str(response.url.join(following)) if following else None

        content, following = self.retries.run(read, watch)
        if len(content) > _MOST_JSON:
            raise Interrupted(
                f"{self.endpoint} answers with more than {_MOST_JSON >> 20} MiB: a mirror may be at fault"
            )
        if following and _origin(following) != _origin(self.endpoint):
            raise Interrupted(
                f"{self.endpoint} goes on with its listing at {httpx2.URL(following).host!r}: a mirror may be at fault"
            )
        try:
            return parse_json(content, address), following
        except BadInput:
            raise Interrupted(
                f"{self.endpoint} does not answer like a Hugging Face Hub: check HF_ENDPOINT and the network's proxy"
            ) from None

    @contextmanager
    def _answer(self, address: str, asked: dict[str, str]) -> Iterator[httpx2.Response]:
        """The answer to a GET, redirects followed. Raises what the client raises, without reading what came with it."""
        for _ in range(_MOST_REDIRECTS):
            own = self._known if _origin(address) == _origin(self.endpoint) else self._anonymous
            with get_session().stream(
                "GET", address, headers=own | asked, timeout=TIMEOUT, follow_redirects=False
            ) as response:
                if response.has_redirect_location:
                    address = str(response.url.join(response.headers["Location"]))
                    continue
                hf_raise_for_status(
                    httpx2.Response(response.status_code, headers=_kept(response), request=response.request)
                )
                if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                    raise Interrupted(
                        f"{response.url.host} sends compressed what was asked for plainly: a proxy or mirror may be at "
                        "fault, try again later or without it"
                    )
                yield response
                return
        raise httpx2.TooManyRedirects(f"more than {_MOST_REDIRECTS} redirects")


class RangeIgnored(httpx2.RemoteProtocolError):
    """A server sends the whole file where a part was asked for."""


def _bounded(response: httpx2.Response, most: int, watch: Watch) -> Generator[bytes, None, None]:
    """The body as it comes, unexpanded, up to `most` bytes. Raises httpx2.ReadTimeout when it comes too slowly."""
    since, count = time.monotonic(), 0
    for chunk in response.iter_raw():
        watch.alive()
        yield chunk[:most]
        most -= len(chunk)
        if most <= 0:
            return
        count += len(chunk)
        passed = time.monotonic() - since
        if passed > WINDOW:
            if count < SLOWEST * passed:
                raise httpx2.ReadTimeout(f"less than {SLOWEST} bytes a second")
            since, count = time.monotonic(), 0


def _kept(response: httpx2.Response) -> list[tuple[bytes, bytes]]:
    """Headers that say what went wrong; those that describe the body would be taken at their word."""
    kept = (b"x-error-code", b"x-error-message", b"retry-after", b"ratelimit", b"x-request-id")
    return [(name, value[:1000]) for name, value in response.headers.raw if name.lower() in kept]


def _origin(address: str) -> tuple[str, str, int | None]:
    url = httpx2.URL(address)
    default = {"http": 80, "https": 443}.get(url.scheme)
    return url.scheme, url.host, url.port or default
