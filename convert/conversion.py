"""What a conversion made: files, their size, how they compare with the source."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import __version__
from ..quant.planning.plan import Plan
from ..runner.measure.evaluate import Parity
from .findings import Findings
from .resume.records import Spent


@dataclass(frozen=True)
class InputFile:
    """A file that decided numbers, and the SHA-256 of its bytes."""

    path: Path
    sha256: str

    @classmethod
    def of(cls, path: str | Path) -> InputFile:
        with Path(path).open("rb") as file:
            return cls(Path(path), hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class Reused:
    """What was taken from an earlier file: so many tensors, of all that the new one has."""

    file: Path
    tensors: int
    of: int


@dataclass(frozen=True)
class Details:
    """What a report shows of a conversion, layer by layer: the plan it followed, and what it found on its way."""

    plan: Plan
    findings: Findings


@dataclass(frozen=True)
class Conversion:
    """What a conversion made.

    Attributes:
        files: the finished files, in split order; a draft's comes last.
        bytes: their size together.
        bits_per_weight: size of the weights alone.
        parity: the comparison with the source, None when verification was skipped.
        problems: what the plan warned about, and what is not as it is in the source.
        seconds: what it took in all, measuring for a budget and earlier runs that this one went on from included.
        peak_rss_bytes: the largest resident memory of any of these runs.
        recipe, source, revision: the plan's name, the folder, file or repository it was made from, and its commit.
        version: moecast's.
        imatrix: the importance matrix that was used.
        texts: those that calibrated and evaluated, by these words.
        reused: what an earlier file had as it was to be made, None where none was given.
        output: the name that was asked for; a split's files have others.
        draft: the file of what drafts tokens, where it has one of its own.
        details: not in the JSON that commands print, because they are long.
    """

    files: tuple[Path, ...]
    bytes: int
    bits_per_weight: float
    parity: Parity | None
    problems: tuple[str, ...]
    seconds: float
    peak_rss_bytes: int
    recipe: str
    source: str
    output: Path
    details: Details
    revision: str | None = None
    version: str = __version__
    imatrix: InputFile | None = None
    texts: Mapping[str, InputFile] = field(default_factory=dict)
    resumed: bool = False
    draft: Path | None = None
    reused: Reused | None = None

    @classmethod
    def of(
        cls,
        output: Path,
        files: Sequence[Path],
        details: Details,
        source: str,
        spent: Spent,
        parity: Parity | None = None,
    ) -> Conversion:
        """The conversion to finished `files`."""
        plan = details.plan
        return cls(
            output=output,
            details=details,
            files=tuple(files),
            bytes=sum(file.stat().st_size for file in files),
            bits_per_weight=plan.bits_per_weight,
            parity=parity,
            problems=plan.problems,
            seconds=spent.seconds,
            peak_rss_bytes=spent.peak_rss_bytes,
            recipe=plan.recipe.name,
            source=source,
        )
