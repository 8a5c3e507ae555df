"""What a user types for a model on the Hub: `owner/name`, an hf:// address, the URL of a page."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import constants, parse_hf_uri
from huggingface_hub.errors import HfUriError

from ...errors import BadInput
from ...paths import is_plain_name

EXPECTED = "expected a checkpoint folder, owner/name, hf://owner/name[@revision] or the URL of a Hub repository"


@dataclass(frozen=True)
class HubSource:
    """A model repository `owner/name`, at a branch, tag or commit, of the Hub that HF_ENDPOINT or `endpoint` names."""

    repository: str
    revision: str = constants.DEFAULT_REVISION
    endpoint: str = field(default_factory=lambda: constants.ENDPOINT)

    @property
    def url(self) -> str:
        return f"{self.endpoint}/{self.repository}"


def parse_source(text: str) -> Path | HubSource:
    """A folder that exists, or else a Hub id, hf:// address or URL. Raises BadInput for anything else."""
    path = Path(os.path.expanduser(text))
    if text and is_there(path.is_dir):
        return path
    if re.match(r"\w+://[^/]*@[^/]+/", text):
        raise BadInput(f"the URL holds a user name or token: leave it out and set HF_TOKEN; {EXPECTED}")
    if is_there(path.is_file):
        raise BadInput(f"{text} is a file: {EXPECTED}")
    if re.match(r"[./~\\]|[A-Za-z]:[/\\]", text) or text.endswith(("/", "\\")):
        raise BadInput(f"{text}: no such folder, {EXPECTED}")
    host, _, rest = text.partition("/")
    address = f"https://{text}" if host.lower() in constants.HF_URL_HOSTS and rest else text
    _refuse_quantized_name(address)
    try:
        found = parse_hf_uri(address if "://" in address else f"hf://{address}", constants.ENDPOINT)
    except HfUriError:
        found = None
    if found is None or (found.path_in_repo and "://" not in address):  # a path of more than two parts
        raise BadInput(f"{text!r} is neither a folder on this machine nor a model on the Hub: {EXPECTED}")
    if found.type != "model":
        raise BadInput(f"{text!r} is not a model repository: {EXPECTED}")
    if found.path_in_repo:
        raise BadInput(_one_file(found.id, found.path_in_repo))
    revision = found.revision or constants.DEFAULT_REVISION
    if not is_plain_name(revision):
        raise BadInput(f"{text!r} names the revision {revision!r}: {EXPECTED}")
    return HubSource(found.id, revision)


def is_there(look: Callable[[], bool]) -> bool:
    """What a look at a path finds; nothing, where a system cannot take its name."""
    try:
        return look()
    except (OSError, ValueError):
        return False


def _refuse_quantized_name(address: str) -> None:
    """llama.cpp and ollama name a file of a repository after a colon."""
    match = re.fullmatch(r"(?:\w+://)?(?:[^/]+/)?([\w.-]+/[\w.-]+):([\w.-]+)", address)
    if match:
        raise BadInput(
            f"{address!r} names the {match[2]} file of a repository as llama.cpp does: to convert a checkpoint give "
            f"{match[1]} and --quant {match[2]}; to read a GGUF file, download it and give its path"
        )


def _one_file(repository: str, path: str) -> str:
    if path.lower().endswith(".gguf"):
        return (
            f"{path} is one file of {repository}: run `hf download {repository} {path}` and give the path that it "
            f"prints; {EXPECTED}"
        )
    return f"{path} is one file of {repository}, and a model is all of them: give {repository}; {EXPECTED}"
