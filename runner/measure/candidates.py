"""Files side by side: the size of each, how far it is from one reference, and which of them others beat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...archs.expressions import stored_tensors
from ...progress import Progress
from ...sources.model import Model
from ..engines import OnnxModel
from ..settings import Compute, Evaluation
from .evaluate import Parity, opened, parities


@dataclass(frozen=True)
class Candidate:
    """A model that was compared.

    Attributes:
        bytes: of the files that hold its weights, all parts together.
        bits_per_weight: size of the weights alone; padding counts as bytes, not as weights. None where both models are
            ONNX Runtime's, which do not say how many weights they have.
        dominated: another candidate is at most as large and at most as divergent, and not equal in both.
    """

    path: Path
    bytes: int
    bits_per_weight: float | None
    parity: Parity
    dominated: bool = False


def compare(
    reference: Model | OnnxModel | str | Path,
    candidates: Sequence[Model | OnnxModel | str | Path],
    evaluation: Evaluation = Evaluation(),
    compute: Compute = Compute(),
    progress: Progress | None = None,
) -> tuple[Candidate, ...]:
    """Compare any number of models with one, in a single pass over it; the smallest comes first. Raises as `parity`."""
    first, models = opened(reference), [*map(opened, candidates)]
    results = parities(first, models, evaluation, compute, progress)
    compared = [
        Candidate(model.path, _bytes_of(model), _bits_per_weight(model, first), parity)
        for model, parity in zip(models, results, strict=True)
    ]
    return ranked(compared)


def ranked(compared: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Candidates of one comparison, the smallest first, with those marked that others dominate."""
    ordered = sorted(compared, key=lambda candidate: (candidate.bytes, _divergence(candidate)))
    return tuple(
        replace(candidate, dominated=any(dominates(other, candidate) for other in ordered)) for candidate in ordered
    )


def dominates(other: Candidate, candidate: Candidate) -> bool:
    """Whether another candidate is at most as large and at most as divergent, and not equal in both."""
    better, worse = ((of.bytes, _divergence(of)) for of in (other, candidate))
    return better != worse and all(own <= its for own, its in zip(better, worse, strict=True))


def _divergence(candidate: Candidate) -> float:
    return candidate.parity.mean_kld if candidate.parity.is_finite else math.inf


def _bytes_of(model: Model | OnnxModel) -> int:
    files = {Path(tensor.file) for tensor in model.tensors} if isinstance(model, Model) else {*model.files}
    return sum(file.stat().st_size for file in files)


def _bits_per_weight(model: Model | OnnxModel, reference: Model | OnnxModel) -> float | None:
    """By how many elements the weights have in the reference, as far as the model has these weights."""
    graphs = [of.graph for of in (model, reference) if isinstance(of, Model)]
    if not graphs:
        return None
    elements = [{weight.name: weight.elements for weight in graph.weights()} for graph in graphs]
    size = _stored_bytes(model) if isinstance(model, Model) else _bytes_of(model)
    return 8 * size / sum(min(of[name] for of in elements if name in of) for name in elements[0])


def _stored_bytes(model: Model) -> int:
    """What the weights of its graph are made of, each tensor once."""
    stored = {tensor for weight in model.graph.weights() for tensor in stored_tensors(weight.source)}
    return sum(tensor.length for tensor in stored)
