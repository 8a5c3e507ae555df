"""A Hugging Face Hub on 127.0.0.1 for tests: it serves a folder to the real client, and fails when told to.

It answers model info, tree and paths-info calls, and resolve URLs by HEAD and GET with Range. Like the real Hub it
redirects large files to a second origin (`localhost`, the stand-in for the CDN), which must never see the token.
What it does with uploads is in `hub_uploads`. It does not offer Xet.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_uploads import Receiving, Store
from huggingface_hub.utils.sha import git_hash

API = "api"
TREE = "api/tree"
_CHUNK = 1 << 14


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer: a status, headers, or damage to the body."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)  # beside the others, or instead of them
    drop_after: int | None = None  # bytes of the body after which the connection closes
    reset: bool = False  # close with RST instead of FIN
    stall_after: int | None = None  # bytes of the body after which nothing comes any more
    drip: float | None = None  # seconds between two bytes
    content: bytes | None = None  # served instead of the file, or of an API call's answer
    before: Callable[[], object] | None = None  # runs before the answer


@dataclass
class Request:
    method: str
    path: str
    host: str
    range: str | None
    token: str | None
    status: int = 0
    sent: int = 0  # body bytes


@dataclass(frozen=True)
class _File:
    path: Path
    size: int
    blob_id: str
    sha256: str | None

    @property
    def etag(self) -> str:
        return self.sha256 or self.blob_id


class HubServer:
    """Serves `folder` as the repository `repository`; `with HubServer(folder) as server: server.endpoint`.

    `token` is the only one with access to a `gated` or `private` repository. `lfs` are the patterns of large files.
    `fail(name, fault, times)` queues faults for the next GETs of a file, or of API calls when the name is `API`, of one
    kind of them when it is `TREE`.
    `push(folder)` makes a new commit on `main`; earlier commits stay. `log` holds every request. Without a folder there
    is no repository until somebody creates it.
    """

    def __init__(
        self,
        folder: Path | None,
        repository: str = "tiny/moe",
        *,
        token: str | None = None,
        gated: bool = False,
        private: bool = False,
        lfs: tuple[str, ...] = ("*.safetensors", "*.gguf", "tokenizer.json"),
    ) -> None:
        self.repository, self.token, self.gated, self.private = repository, token, gated, private
        self.log: list[Request] = []
        self.branches: dict[str, str] = {}
        self.store = Store(lfs)
        self.exists = folder is not None
        self._commits: dict[str, dict[str, _File]] = {}
        self.closing = threading.Event()
        self._faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self._http = _Server(("127.0.0.1", 0), _handler(self))
        if folder:
            self.push(folder)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def cdn(self) -> str:
        return f"http://localhost:{self._http.server_port}"

    @property
    def commit(self) -> str:
        """The commit `main` points to."""
        return self.branches["main"]

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self.store.close()

    def push(self, folder: Path, branch: str = "main") -> str:
        """Commits the files as they are now (they must stay in place) and returns the commit."""
        files = {
            path.relative_to(folder).as_posix(): self._file(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        return self._commit(files, branch)

    def receive(self, contents: dict[str, bytes], branch: str) -> str:
        """Commits files that were sent, beside those that are there, and returns the commit."""
        files = dict(self._commits[self.branches[branch]]) if branch in self.branches else {}
        files |= {name: self._file(self.store.keep(content), name) for name, content in contents.items()}
        return self._commit(files, branch)

    def _commit(self, files: dict[str, _File], branch: str) -> str:
        commit = hashlib.sha1(repr([(name, file.etag) for name, file in files.items()]).encode()).hexdigest()
        self._commits[commit] = files
        self.branches[branch] = commit
        return commit

    def _file(self, path: Path, name: str | None = None) -> _File:
        content = path.read_bytes()
        if not self.store.is_large(name or path.name):
            return _File(path, len(content), git_hash(content), None)
        sha256 = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n"
        return _File(path, len(content), git_hash(pointer.encode()), sha256)

    def fail(self, name: str, fault: Fault, times: int = 1) -> None:
        self._faults[name].extend([fault] * times)

    def forgive(self) -> None:
        """Forget the faults that were not met yet."""
        self._faults.clear()

    def next_fault(self, name: str) -> Fault:
        return self._faults[name].popleft() if self._faults[name] else Fault()

    def bodies(self, name: str | None = None) -> list[Request]:
        """The GET requests that asked for bytes of a file (of `name`, or of any), redirects left out."""
        ending = "" if name is None else f"/{name}"
        return [
            request
            for request in self.log
            if request.method == "GET"
            and not request.path.startswith("/api/")
            and urlsplit(request.path).path.endswith(ending)
            and request.status != 302
        ]

    def listing(self, revision: str) -> list[dict[str, object]]:
        """What a tree call answers for a commit."""
        found = self.tree(revision)
        return [_listing(name, file) for name, file in found[1].items()] if found else []

    def tree(self, revision: str) -> tuple[str, dict[str, _File]] | None:
        """The commit a branch or commit hash stands for, and its files."""
        commit = self.branches.get(revision, revision)
        return (commit, self._commits[commit]) if commit in self._commits else None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients hang up when they have had enough
            super().handle_error(request, client_address)

    def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        """Closes at once: a polite shutdown would send FIN before the RST that a fault asks for."""
        self.close_request(request)


def _handler(server: HubServer) -> type[_Handler]:
    class Handler(_Handler):
        hub = server

    return Handler


class _Handler(Receiving):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: object) -> None:
        """Silence: `HubServer.log` is the record."""

    def note_request(self) -> None:
        self.request_log = Request(
            self.command, self.path, self.headers.get("Host", ""), self.headers.get("Range"), self.token()
        )
        self.hub.log.append(self.request_log)

    def _answer(self) -> None:
        self.note_request()
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        repository = self.hub.repository.split("/")
        if parts[:1] == ["api"] and parts[-1] in ("create", "validate-yaml"):
            self.take(parts[-1])
        elif not self.hub.exists:
            self._error(404, "RepoNotFound", "Repository not found")
        elif parts[1:2] == [f"{repository[1]}.git"]:
            self.take("batch")
        elif self.command == "POST" and parts[4:5] and parts[4] in ("branch", "preupload", "commit"):
            self.take(parts[4], parts[5])
        elif parts[:1] == ["cdn"]:
            _, files = self.hub.tree(parts[1]) or ("", {})
            self._file(files["/".join(parts[2:])], "/".join(parts[2:]), {})
        elif parts[:2] == ["api", "models"] and parts[2:4] == repository:
            self._api(*(parts[4:6] or ["revision", "main"]))
        elif parts[:2] == repository and parts[2:3] == ["resolve"]:
            self._resolve(parts[3], "/".join(parts[4:]))
        else:
            self._error(404, "RepoNotFound", "Repository not found")

    def _allowed(self, reading_files: bool) -> bool:
        """Answers for the real Hub's access rules: gated repositories list their files to anybody."""
        token, hub = self.request_log.token, self.hub
        if token is not None and hub.token is not None and token != hub.token:
            self._error(401, None, "Invalid credentials in Authorization header")
        elif hub.private and token is None:
            self._error(401, "RepoNotFound", "Invalid username or password.")
        elif hub.gated and reading_files and (token is None or token != hub.token):
            self._error(403 if token else 401, "GatedRepo", f"Access to model {hub.repository} is restricted.")
        else:
            return True
        return False

    def _api(self, call: str, revision: str) -> None:
        fault = self.hub.next_fault(f"{API}/{call}")
        fault = self.hub.next_fault(API) if fault == Fault() else fault
        if fault.before:
            fault.before()
        if fault.status:
            self._error(fault.status, None, "made to fail", fault.headers)
        elif fault.content is not None:
            self._head(200, {"Content-Type": "application/json"} | fault.headers, len(fault.content))
            self._body(fault.content, fault)
        elif self._allowed(reading_files=False):
            found = self.hub.tree(revision)
            if found is None:
                self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                return
            commit, files = found
            if call == "revision":
                names = [{"rfilename": name} for name in files]
                described = {"id": self.hub.repository, "sha": commit, "private": self.hub.private, "tags": []}
                self._json(described | {"siblings": names})
            elif call == "tree":
                self._json(self.hub.listing(revision), fault.headers)
            else:  # paths-info
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
                self._json([_listing(name, files[name]) for name in paths if name in files])

    def _resolve(self, revision: str, name: str) -> None:
        found = self.hub.tree(revision)
        if not self._allowed(reading_files=True):
            return
        if found is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif name not in found[1]:
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": found[0]})
        else:
            commit, file = found[0], found[1][name]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"'}
            if file.sha256 is None:
                self._file(file, name, headers)
                return
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
            location = f"{self.hub.cdn}/cdn/{commit}/{quote(name)}?Signature=signed"
            self._head(302, headers | {"Location": location}, 0)

    def _file(self, file: _File, name: str, headers: dict[str, str]) -> None:
        fault = self.hub.next_fault(name) if self.command == "GET" else Fault()
        if fault.before:
            fault.before()
        if fault.status:
            self._error(fault.status, None, "made to fail", fault.headers)
            return
        content = file.path.read_bytes() if fault.content is None else fault.content
        status, start, end = 200, 0, len(content)
        if self.request_log.range:
            first, last = self.request_log.range.removeprefix("bytes=").split("-")
            status, start, end = 206, int(first), min(int(last) + 1, end) if last else end
            if start >= end:
                self._error(416, None, "Range not satisfiable", {"Content-Range": f"bytes */{len(content)}"})
                return
            headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
        self._head(status, headers | fault.headers, end - start)
        if self.command == "GET":
            self._body(content[start:end], fault)

    def _body(self, content: bytes, fault: Fault) -> None:
        ends = [length for length in (fault.drop_after, fault.stall_after, len(content)) if length is not None]
        step = 1 if fault.drip else _CHUNK
        for start in range(0, min(ends), step):
            chunk = content[start : min(start + step, *ends)]
            self.request_log.sent += len(chunk)
            self.wfile.write(chunk)
            if fault.drip and self.hub.closing.wait(fault.drip):
                break
        if fault.stall_after is not None:
            self.hub.closing.wait()
            self.close_connection = True
        if fault.drop_after is not None:
            if fault.reset:  # SO_LINGER of zero seconds turns the close into a reset
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    def _json(self, value: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._head(200, {"Content-Type": "application/json"} | (headers or {}), len(body))
        self.wfile.write(body)

    def answer_json(self, value: object) -> None:
        self._json(value)

    def answer_error(self, status: int, message: str, more: dict[str, object] | None = None) -> None:
        self._error(status, None, message, more=more)

    def _error(
        self,
        status: int,
        code: str | None,
        message: str,
        headers: dict[str, str] | None = None,
        more: dict[str, object] | None = None,
    ) -> None:
        body = json.dumps({"error": message} | (more or {})).encode()
        coded = {"X-Error-Code": code} if code else {}
        described = {"X-Error-Message": message, "Content-Type": "application/json"}
        self._head(status, described | coded | (headers or {}), len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.request_log.status = status
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(length)}).items():
            self.send_header(name, value)
        self.end_headers()


def _listing(name: str, file: _File) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": file.size, "oid": file.blob_id}
    if file.sha256:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    return entry
