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
    _refuse_credentials(text)
    if is_there(path.is_file):
        raise BadInput(f"{text} is a file: {EXPECTED}")
    if _is_path(text):
        raise BadInput(f"{text}: no such folder, {EXPECTED}")
    _refuse_quantized_name(_address(text))
    found = _hub_address(text)
    if found is None or (found[1] and "://" not in _address(text)):  # a path of more than two parts
        raise BadInput(f"{text!r} is neither a folder on this machine nor a model on the Hub: {EXPECTED}")
    source, path_in_repository = found
    if path_in_repository:
        raise BadInput(_one_file(source.repository, path_in_repository))
    return source


def parse_file(text: str) -> tuple[HubSource, str | None]:
    """A repository, and the file of it that is meant if one is named: `owner/name/file`, or as `parse_source`.

    Raises BadInput for what names no repository.
    """
    _refuse_credentials(text)
    found = None if _is_path(text) else _hub_address(text)
    if found is None:
        raise BadInput(f"{text!r} is neither a file on this machine nor one on the Hub, such as owner/name/file")
    return found


def _refuse_credentials(text: str) -> None:
    if re.match(r"\w+://[^/]*@[^/]+/", text):
        raise BadInput(f"the URL holds a user name or token: leave it out and set HF_TOKEN; {EXPECTED}")


def _is_path(text: str) -> bool:
    """Whether it can only be the path of a folder or file."""
    return bool(re.match(r"[./~\\]|[A-Za-z]:[/\\]", text)) or text.endswith(("/", "\\"))


def _hub_address(text: str) -> tuple[HubSource, str | None] | None:
    """A model repository and what is named within it; None for what is no address."""
    address = _address(text)
    try:
        found = parse_hf_uri(address if "://" in address else f"hf://{address}", constants.ENDPOINT)
    except HfUriError:
        return None
    if found.type != "model":
        raise BadInput(f"{text!r} is not a model repository: {EXPECTED}")
    revision = found.revision or constants.DEFAULT_REVISION
    if not is_plain_name(revision):
        raise BadInput(f"{text!r} names the revision {revision!r}: {EXPECTED}")
    return HubSource(found.id, revision), found.path_in_repo or None


def _address(text: str) -> str:
    """With the protocol, where the name of a host comes first."""
    host, _, rest = text.partition("/")
    return f"https://{text}" if host.lower() in constants.HF_URL_HOSTS and rest else text


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
