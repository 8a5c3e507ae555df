"""How to get at a repository of the Hub, and what of it to keep on this machine."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...errors import BadInput


@dataclass(frozen=True)
class HubAccess:
    """How a Hub repository is fetched, and what of a configuration does not matter.

    Attributes:
        revision: branch, tag or commit.
        token: by default HF_TOKEN, or the one that `hf auth login` stored.
        scratch: most bytes of shards on disk while they are fetched, used and dropped; by default what two layers need.
        keep_source: fetch everything first, and keep it in the Hub's cache.
        ignore_config: keys of config.json or GGUF metadata that are taken to change nothing; of folders and files too.
    """

    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    scratch: int | None = None
    keep_source: bool = False
    ignore_config: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.keep_source and self.scratch is not None:
            raise BadInput("--keep-source keeps every shard and --scratch limits them: leave one of them out")
