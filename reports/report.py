"""What a report says, as data: the page is drawn from it, and the JSON file is it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import TYPE_CHECKING, Any

from .text import ranges

if TYPE_CHECKING:
    from ..runner.measure.candidates import Candidate
    from ..runner.measure.evaluate import Parity

VERSION = 1
_LARGE, _SHARE = 3, 0.1  # times the median, and of the largest error: a jump that stands out


@dataclass(frozen=True)
class ReportedTensor:
    """A tensor of the file.

    Attributes:
        role: what it does, in the words of `Role`.
        weights: how many numbers it holds.
        rounding_error: |stored - source| / |source|; None where it was not measured.
        protected: it always has this type.
    """

    name: str
    role: str
    layer: int | None
    type: str
    weights: int
    bytes: int
    rounding_error: float | None = None
    protected: bool = False


@dataclass(frozen=True)
class Group:
    """Tensors of one role and type; `layers` are those they are in, "0-2, 5"."""

    role: str
    type: str
    layers: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class LayerError:
    """|candidate - reference| / |reference| of the hidden states after a layer; `jump`: what the layer has added."""

    layer: int
    error: float
    jump: float


@dataclass(frozen=True)
class ExpertTraffic:
    """How many calibration tokens each expert of a layer has seen."""

    layer: int
    tokens: Sequence[int]

    @property
    def unseen(self) -> list[int]:
        return [expert for expert, count in enumerate(self.tokens) if not count]

    @property
    def fewest(self) -> int:
        return min(self.tokens)

    @property
    def median(self) -> float:
        return median(self.tokens)

    @property
    def most(self) -> int:
        return max(self.tokens)

    @property
    def summary(self) -> str:
        """The layer in a line."""
        fewest, most = (f"{count} (expert {self.tokens.index(count)})" for count in (self.fewest, self.most))
        unseen = f", {len(self.unseen)} never seen" if self.unseen else ""
        return f"layer {self.layer}: fewest {fewest}, median {self.median:g}, most {most} tokens{unseen}"


@dataclass(frozen=True)
class Provenance:
    """Where a result comes from, and how to repeat it.

    Attributes:
        source: repository, folder or file of the reference; `revision` is its commit.
        texts: names and SHA-256 of the files that decided numbers, by what they were used for.
        versions: of moecast, Python and the libraries that compute.
        command: what was typed, without tokens; None where it was a Python program.
    """

    source: str
    revision: str | None = None
    texts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    command: str | None = None


@dataclass(frozen=True)
class Report:
    """A conversion, a comparison or a plan; what is not known of it is None or empty.

    Attributes:
        kind: "conversion", "comparison" or "plan".
        bytes: of the files, or what the plan comes to.
        expected_kld: what measurements of single weights let a plan expect.
        bytes_per_token: of the weights that a token touches.
        parity: of what alone was compared.
        candidates: several that were compared with one reference, the smallest first.
        experts: layers whose experts saw calibration tokens.
    """

    kind: str
    title: str
    provenance: Provenance
    bytes: int | None = None
    bits_per_weight: float | None = None
    recipe: str | None = None
    expected_kld: float | None = None
    bytes_per_token: float | None = None
    parity: Parity | None = None
    tensors: tuple[ReportedTensor, ...] = ()
    experts: tuple[ExpertTraffic, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def layers(self) -> list[LayerError]:
        errors = self.parity.layer_errors if self.parity else ()
        jumps = (error - before for error, before in zip(errors, (0.0, *errors), strict=False))
        return [LayerError(layer, error, jump) for layer, (error, jump) in enumerate(zip(errors, jumps, strict=True))]

    @property
    def first_large_error(self) -> LayerError | None:
        """The first layer that adds much: three times what the median layer does, and a tenth of the largest error.

        None where none does. The very first is not looked at: what the embedding has changed comes in with it too.
        """
        layers, later = self.layers, self.layers[1:]
        usual = median(layer.jump for layer in later) if later else 0.0
        largest = max((layer.error for layer in layers), default=0.0)
        return next((layer for layer in later if layer.jump > max(_LARGE * usual, _SHARE * largest)), None)

    def as_json(self) -> dict[str, Any]:
        """What docs/reports.md describes."""
        facts = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        facts["parity"] = {**asdict(self.parity), "problems": self.parity.problems} if self.parity else None
        facts["experts"] = [{**asdict(e), "fewest": e.fewest, "unseen": e.unseen} for e in self.experts]
        facts["candidates"] = [*map(candidate_as_json, self.candidates)]
        return {"version": VERSION, **facts, "layers": self.layers, "first_large_error": self.first_large_error}


def grouped(tensors: Sequence[ReportedTensor]) -> list[Group]:
    """Tensors by role and type, roles in the order of the file."""
    groups: dict[str, dict[str, list[ReportedTensor]]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.role, {}).setdefault(tensor.type, []).append(tensor)
    return [
        Group(
            role,
            type,
            ranges([tensor.layer for tensor in members if tensor.layer is not None]),
            len(members),
            sum(tensor.bytes for tensor in members),
        )
        for role, types in groups.items()
        for type, members in types.items()
    ]


def candidate_as_json(candidate: Candidate) -> dict[str, Any]:
    """One of several, as `parity --json` prints it."""
    parity = candidate.parity
    facts = {"path": candidate.path, "bytes": candidate.bytes, "bits_per_weight": candidate.bits_per_weight}
    further = {
        "perplexity_ratio": parity.perplexity_ratio,
        "dominated": candidate.dominated,
        "categories": [asdict(text) for text in parity.slices["category"]],
        "problems": parity.problems,
    }
    return facts | asdict(parity) | further
