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

from ...errors import BadInput, Interrupted

if TYPE_CHECKING:
    from .address import HubSource

MAY_WRITE = "run `hf auth login`, or set HF_TOKEN to an access token that may write"
GOES_ON = "run the same again, what has arrived is not sent again"


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


@contextmanager
def upload_explained(target: HubSource) -> Iterator[None]:
    """Turns what the client raises while it sends files into Interrupted, or into BadInput for what the Hub refuses."""
    try:
        yield
    except (httpx2.HTTPError, OSError, RuntimeError) as error:
        around = isinstance(error, RuntimeError) and isinstance(error.__cause__, httpx2.HTTPError | OSError)
        raise Interrupted(_upload_explanation(error.__cause__ if around else error, target)) from error
    except BadInput:
        raise
    except ValueError as error:  # about the metadata of a card, before anything is committed
        reason = " ".join(str(error).split())[:500]
        raise BadInput(f"{target.endpoint} does not take the files: {reason}") from error


def _upload_explanation(error: BaseException | None, target: HubSource) -> str:
    endpoint, repository = target.endpoint, target.repository
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    refused = isinstance(error, RepositoryNotFoundError) or (isinstance(error, PermissionError) and error.errno is None)
    if refused or status in (401, 403):
        return f"{endpoint} does not let this access token write to {repository}: check the name; {MAY_WRITE}"
    if status == 412:
        return f"somebody else has changed {target.url} meanwhile: {GOES_ON}"
    if isinstance(error, HfHubHTTPError):
        said = f" ({_first_line(error.server_message)})" if error.server_message else ""
        return f"{endpoint} answers {status} for {repository}{said}: {GOES_ON}"
    if isinstance(error, httpx2.TransportError):
        return f"the connection to {endpoint} is lost ({type(error).__name__}): check the network and {GOES_ON}"
    return f"the upload to {target.url} has stopped ({_first_line(error)}): {GOES_ON}"


def _first_line(text: object) -> str:
    return (str(text).strip().splitlines() or [type(text).__name__])[0][:200]
