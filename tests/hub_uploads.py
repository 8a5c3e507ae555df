"""What the Hub of the tests does with uploads: repositories, large files by LFS, commits as NDJSON, as the real Hub."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

UPLOAD = "upload"
COMMIT = "api/commit"
_LICENSES = ("apache-2.0", "mit", "cc-by-nc-4.0", "llama3.1", "other")  # of those that the Hub knows
_TASKS = ("text-generation", "image-text-to-text", "any-to-any")
_MODEL = r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?/[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?"


def metadata_fault(card: str) -> str | None:
    """What the Hub refuses of the front matter of a card, by its documentation of model cards."""
    try:
        values = yaml.safe_load(card.split("---\n")[1])
    except (yaml.YAMLError, IndexError) as error:
        return str(error)
    license, named = values.get("license", "mit"), values.get("license_name", "a-name")
    languages, tags = values.get("language", []), values.get("tags", [])
    rules = {
        '"license" must be one of [apache-2.0, mit, ...]': license in _LICENSES,
        '"license_name" must be lower case, without blanks': re.fullmatch(r"[a-z0-9.-]+", named),
        '"license_link" must be a file here or a URL': re.fullmatch(
            r"LICENSE(\.md)?|https?://\S+", values.get("license_link", "LICENSE")
        ),
        '"base_model" must be a model id': re.fullmatch(_MODEL, values.get("base_model", "owner/name")),
        '"base_model_relation" must be one of [adapter, merge, quantized, finetune]': (
            values.get("base_model_relation", "merge") in ("adapter", "merge", "quantized", "finetune")
        ),
        '"language[0]" must only contain lowercase characters': all(map(str.islower, languages)),
        '"tags" must be a list of texts': all(isinstance(tag, str) for tag in tags),
        '"pipeline_tag" must be a task': values.get("pipeline_tag", "text-generation") in _TASKS,
    }
    return next((rule for rule, holds in rules.items() if not holds), None)


class Store:
    """Files that were sent: contents by their SHA-256, and where they lie."""

    def __init__(self, lfs: tuple[str, ...]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._lfs = lfs
        self.batches: list[list[str]] = []  # SHA-256 of the files of each LFS batch

    def close(self) -> None:
        self._folder.cleanup()

    def is_large(self, name: str) -> bool:
        return any(fnmatchcase(name.rpartition("/")[2], pattern) for pattern in self._lfs)

    def path(self, sha256: str) -> Path:
        return Path(self._folder.name, sha256)

    def damage(self, sha256: str) -> None:
        self.path(sha256).write_bytes(b"something else")

    def keep(self, content: bytes) -> Path:
        path = self.path(hashlib.sha256(content).hexdigest())
        path.write_bytes(content)
        return path


class Receiving(BaseHTTPRequestHandler):
    """The part of the handler that takes what clients send; the rest is `hub_server`'s."""

    hub: Any

    def do_PUT(self) -> None:
        """A large file, from a client that shows no token: the address is signed."""
        self.note_request()
        sha256 = urlsplit(self.path).path.rpartition("/")[2]
        fault, size = self.hub.next_fault(UPLOAD), int(self.headers["Content-Length"])
        if fault.drop_after is not None:
            self.rfile.read(fault.drop_after)
            self.close_connection = True
            return
        content = self.rfile.read(size)
        if fault.status:
            self.answer_error(fault.status, "made to fail")
        elif hashlib.sha256(content).hexdigest() != sha256:
            self.answer_error(400, "not what was promised")
        else:
            self.hub.store.keep(content if fault.content is None else fault.content)
            self.answer_json({})

    def take(self, call: str, revision: str = "main") -> None:
        """Answer a POST that changes something."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        fault = self.hub.next_fault(f"api/{call}")
        if fault.before:
            fault.before()
        if fault.status:
            self.answer_error(fault.status, "made to fail")
        elif fault.drop_after is not None:
            self.close_connection = True
        elif call == "validate-yaml":
            self._validate(json.loads(body)["content"])
        elif self.hub.token is not None and self.token() != self.hub.token:
            self.answer_error(403 if self.token() else 401, "You don't have the rights to write here")
        elif call == "create":
            self._create(json.loads(body))
        elif call == "branch":
            self.hub.branches[revision] = self.hub.commit
            self.answer_json({})
        elif call == "preupload":
            self._preupload(json.loads(body)["files"], revision)
        elif call == "batch":
            self._batch(json.loads(body)["objects"])
        else:
            self._commit([json.loads(line) for line in body.splitlines()], revision)

    def token(self) -> str | None:
        authorization = self.headers.get("Authorization")
        return authorization.removeprefix("Bearer ") if authorization else None

    def note_request(self) -> None:
        raise NotImplementedError

    def answer_json(self, value: object) -> None:
        raise NotImplementedError

    def answer_error(self, status: int, message: str, more: dict[str, object] | None = None) -> None:
        raise NotImplementedError

    def _validate(self, card: str) -> None:
        if wrong := metadata_fault(card):
            self.answer_error(400, wrong, {"errors": [{"message": wrong}]})
        else:
            self.answer_json({"warnings": [], "errors": []})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name != self.hub.repository:
            self.answer_error(403, f"You don't have the rights to create {name}")
            return
        url = {"url": f"{self.hub.endpoint}/{name}", "id": name}
        if self.hub.exists:
            self.answer_error(409, "You already created this model repo", url)
            return
        self.hub.private = asked.get("visibility") == "private"
        self.hub.exists = True
        self.hub.receive({".gitattributes": b"*.gguf filter=lfs\n"}, "main")
        self.answer_json(url)

    def _preupload(self, files: list[dict[str, Any]], revision: str) -> None:
        there = self.hub.tree(revision)[1]
        self.answer_json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if self.hub.store.is_large(file["path"]) else "regular",
                        "shouldIgnore": False,
                        "oid": there[file["path"]].etag if file["path"] in there else None,
                    }
                    for file in files
                ]
            }
        )

    def _batch(self, objects: list[dict[str, Any]]) -> None:
        self.hub.store.batches.append([wanted["oid"] for wanted in objects])
        for wanted in objects:
            if not self.hub.store.path(wanted["oid"]).exists():
                wanted["actions"] = {"upload": {"href": f"{self.hub.cdn}/upload/{wanted['oid']}"}}
        self.answer_json({"transfer": "basic", "objects": objects})

    def _commit(self, lines: list[dict[str, Any]], revision: str) -> None:
        parent = lines[0]["value"].get("parentCommit")
        if parent and parent != self.hub.branches[revision]:
            self.answer_error(412, "A commit has happened since. Please refresh and try again.")
            return
        contents: dict[str, bytes] = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                contents[value["path"]] = base64.b64decode(value["content"])
            elif self.hub.store.path(value["oid"]).exists():
                contents[value["path"]] = self.hub.store.path(value["oid"]).read_bytes()
            else:
                self.answer_error(400, f"{value['path']} was not uploaded")
                return
        commit = self.hub.receive(contents, revision)
        url = f"{self.hub.endpoint}/{self.hub.repository}/commit/{commit}"
        self.answer_json({"success": True, "commitOid": commit, "commitUrl": url})
