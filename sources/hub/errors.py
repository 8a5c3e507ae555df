"""Turns errors of the Hub's client into one line that says what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx2
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from ...errors import Interrupted

if TYPE_CHECKING:
    from .address import HubSource


@contextmanager
def explained(source: HubSource) -> Iterator[None]:
    """Turns what the client raises into Interrupted: nothing is wrong with what was fetched before."""
    try:
        yield
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, RevisionResolutionError) as error:
        raise Interrupted(_explanation(error, source)) from error


def _explanation(error: BaseException, source: HubSource) -> str:
    endpoint, log_in = source.endpoint, "run `hf auth login` or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return f"{source.repository} is gated: accept its terms at {source.url}, then {log_in}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{source.url} does not exist, or is private: check the name, or {log_in}"
    if isinstance(error, RevisionNotFoundError):
        return f"{source.url} has no revision {source.revision!r}: expected a branch, a tag or a commit of it"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"{endpoint} does not accept the access token for {source.repository}: {log_in} to a valid one"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return f"{endpoint} answers {status} for {source.repository}: run the same again later, it will resume"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full: make room, or choose another disk with HF_HOME or an output folder; it will resume"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'the download'} cannot be written: {error.strerror}"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{source.url} cannot be read while HF_HUB_OFFLINE is set: unset it"
    if error.__cause__ is not None and not isinstance(error, httpx2.HTTPError):
        return _explanation(error.__cause__, source)
    return (
        f"{endpoint} cannot be reached ({type(error).__name__}): check the network and run the same again, it will"
        " resume; HF_HUB_OFFLINE=1 uses what was fetched before"
    )
