"""What is to be published: the GGUF files of a folder, their reports, and what speaks against publishing them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..documents import exists, is_folder
from ..errors import BadInput
from ..quant.planning.plan import Plan
from ..quant.planning.plan_file import StoredTypes, plan_like
from ..quant.planning.recipes import RECIPES
from ..runner.measure.candidates import Candidate, dominates, ranked
from ..sources.imatrix import is_imatrix
from ..sources.model import open_model
from .stored import StoredReport, read_report
from .text import ranges

_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DRAFT = "-mtp"  # what the name of a draft ends in that belongs to another file


@dataclass(frozen=True)
class PublishedFile:
    """A model in a folder: its parts, what they hold, and the report of the conversion that made it.

    `metadata` are the keys of the GGUF file; `draft` is the file of its own that multi-token prediction is in.
    """

    name: str
    parts: tuple[Path, ...]
    metadata: Mapping[str, Any]
    plan: Plan
    report: StoredReport | None
    draft: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        return (*self.parts, self.draft) if self.draft else self.parts

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    @property
    def candidate(self) -> Candidate | None:
        """As one of several that were compared with their source, None where it was not."""
        if not self.report or not self.report.parity:
            return None
        return Candidate(Path(self.parts[0].name), self.bytes, self.plan.bits_per_weight, self.report.parity)

    @property
    def recipe(self) -> str:
        """By the name that is in the file."""
        return self.plan.recipe.name

    @property
    def is_stock(self) -> bool:
        """Whether it has the types that llama-quantize gives."""
        return self.recipe in RECIPES


@dataclass(frozen=True)
class PublishedFolder:
    """Files from the smallest to the largest, and importance matrices beside them.

    `said` is the repository that they were made from by who publishes them.
    """

    path: Path
    files: tuple[PublishedFile, ...]
    matrices: tuple[Path, ...]
    said: str | None = None

    @property
    def base_model(self) -> str | None:
        """The repository that the files were made from, as they hold it themselves or as it is said."""
        held = self.files[0].metadata.get("moecast.source.repository")
        return held if isinstance(held, str) and _REPOSITORY.fullmatch(held) else self.said

    @property
    def are_compared(self) -> bool:
        """Whether there are several, all measured on the same tokens."""
        return self.are_comparable and len(self.files) > 1

    @property
    def are_comparable(self) -> bool:
        """Whether all files were measured, and on the same tokens."""
        bases = {file.report.basis if file.report else None for file in self.files}
        return len(bases) == 1 and None not in bases

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The files that were measured; where they cannot be compared none is dominated."""
        found = [file.candidate for file in self.files if file.candidate]
        return ranked(found) if self.are_comparable else tuple(found)

    def faults(self) -> list[str]:
        """What speaks against publishing the files, a line each."""
        return [f"{file.name}: {fault}" for file in self.files for fault in self._faults(file)]

    def _faults(self, file: PublishedFile) -> Iterator[str]:
        report = file.report
        if report is None:
            yield f"not measured, {file.name}.report.json is missing: `moecast convert` writes it beside the file"
            return
        if report.bytes != file.bytes:
            yield (
                f"not measured, {report.path.name} is of a file of {report.bytes} bytes and this one has {file.bytes}: "
                "convert again"
            )
        elif report.parity is None:
            yield f"not measured, {report.path.name} holds no comparison with the source: convert without --no-verify"
        if report.unseen:
            count, layers = sum(map(len, report.unseen.values())), ranges([*report.unseen])
            yield f"calibration never saw {count} experts of layers {layers}: give a longer --calibration text"
        if stock := self._beaten_by_stock(file):
            yield f"worse than the stock mix {stock.recipe}, which is here too and no larger: leave it out"

    def _beaten_by_stock(self, file: PublishedFile) -> PublishedFile | None:
        if file.is_stock or not file.candidate or not self.are_comparable:
            return None
        stock = (other for other in self.files if other.is_stock)
        return next((other for other in stock if other.candidate and dominates(other.candidate, file.candidate)), None)


def read_folder(path: Path, base_model: str | None = None) -> PublishedFolder:
    """Files to publish; `base_model` is what they were made from, where they do not hold it themselves.

    Raises BadInput for a folder without a GGUF file, and for files that are damaged or of other models.
    """
    if not is_folder(path):
        raise BadInput(f"{path}: no such folder, expected one with the GGUF files that `moecast convert` made")
    found = sorted(file for file in path.iterdir() if file.name.lower().endswith(".gguf"))
    names = {file.stem for file in found}
    alone = [file for file in found if _belongs_to(file.stem) not in names]
    matrices = [file for file in alone if is_imatrix(file)]
    first = [file for file in alone if file not in matrices]
    if not first:
        raise BadInput(f"{path} holds no GGUF file of a model: expected those that `moecast convert` made")
    files = sorted((_read_file(file) for file in first), key=lambda file: file.bytes)
    _require_one_model(path, files)
    folder = PublishedFolder(path, tuple(files), tuple(matrices), base_model)
    if base_model not in (None, folder.base_model):
        raise BadInput(f"{path}: its files were made from {folder.base_model}, leave out --base-model {base_model}")
    return folder


def plan_names(folder: PublishedFolder) -> list[str]:
    """What the plan of each file is called where it is published."""
    return ["plan.json"] if len(folder.files) == 1 else [f"{file.name}.plan.json" for file in folder.files]


def _read_file(path: Path) -> PublishedFile:
    model = open_model(path)
    recipe = str(model.metadata.get("moecast.quant", "other"))
    stored = StoredTypes(path.name, recipe, {tensor.name: (tensor.dtype, tensor.shape) for tensor in model.tensors})
    split = _PART.search(path.stem)
    name = path.stem[: split.start()] if split else path.stem
    parts = sorted(path.parent.glob(f"{_pattern(name)}-*-of-{split[2]}.gguf")) if split else [path]
    report, draft = path.with_name(f"{name}.report.json"), path.with_name(f"{name}{_DRAFT}.gguf")
    return PublishedFile(
        name,
        tuple(parts),
        model.metadata,
        plan_like(model.graph, stored),
        read_report(report) if exists(report) else None,
        draft if exists(draft) else None,
    )


def _pattern(name: str) -> str:
    """A name in which nothing is a wildcard."""
    return re.sub(r"[\[*?]", r"[\g<0>]", name)


def _belongs_to(stem: str) -> str | None:
    """The name of the file that this one goes with, as a further part or as its draft."""
    if split := _PART.search(stem):
        return None if int(split[1]) == 1 else f"{stem[: split.start()]}-{1:05d}-of-{split[2]}"
    return stem.removesuffix(_DRAFT) if stem.endswith(_DRAFT) else None


def _require_one_model(path: Path, files: Sequence[PublishedFile]) -> None:
    """Raises BadInput where a card could not say what all files are made from."""
    keys = ("general.architecture", "moecast.source.repository")
    found = {tuple(file.metadata.get(key) for key in keys): file.name for file in files}
    if len(found) > 1:
        one, other = list(found.values())[:2]
        raise BadInput(f"{path}: {one} and {other} are made from different models: publish them from two folders")
