"""Makes reports of what commands have done."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING

from .. import __version__
from ..archs.expressions import first_tensor
from ..quant.planning.allocation import bytes_per_token
from .report import ExpertTraffic, Provenance, Report, ReportedTensor

if TYPE_CHECKING:
    from ..archs.graph import Graph
    from ..convert.conversion import Conversion, InputFile
    from ..quant.planning.plan import Plan
    from ..runner.engines import OnnxModel
    from ..runner.measure.candidates import Candidate
    from ..runner.settings import Evaluation
    from ..sources.model import Model

_LIBRARIES = ("torch", "numpy", "gguf")


def conversion_report(made: Conversion, command: str | None = None) -> Report:
    """What `convert` has made. `command` is what was typed."""
    files = {**made.texts, **({"importance matrix": made.imatrix} if made.imatrix else {})}
    plan, found = made.details.plan, made.details.findings
    return Report(
        kind="conversion",
        title=made.output.name,
        provenance=_provenance(made.source, files, command, made.revision),
        bytes=made.bytes,
        bits_per_weight=made.bits_per_weight,
        recipe=made.recipe,
        expected_kld=plan.expected_kld,
        bytes_per_token=bytes_per_token(plan),
        parity=made.parity,
        tensors=planned_tensors(plan, found.rounding_errors),
        experts=tuple(ExpertTraffic(*layer) for layer in found.expert_tokens.items()),
        problems=made.problems,
    )


def conversions_report(made: Sequence[Conversion], command: str | None = None) -> Report:
    """How files compare that `convert` has made of one source in one pass."""
    files = {use: file for one in made for use, file in one.texts.items()}
    return Report(
        kind="comparison",
        title=f"{len(made)} files of {made[0].source.rstrip('/').rpartition('/')[2]}",
        provenance=_provenance(made[0].source, files, command, made[0].revision),
        candidates=candidates_of(made),
        problems=tuple(f"{one.output.name}: {line}" for one in made for line in one.problems),
    )


def candidates_of(made: Sequence[Conversion]) -> tuple[Candidate, ...]:
    """Those of some conversions that were compared with their source, the smallest first."""
    from ..runner.measure.candidates import Candidate, ranked

    return ranked([Candidate(one.output, one.bytes, one.bits_per_weight, one.parity) for one in made if one.parity])


def plan_report(plan: Plan, source: str, command: str | None = None) -> Report:
    """A plan for a model that is called `source`."""
    return Report(
        kind="plan",
        title=f"{source.rstrip('/').rpartition('/')[2]}, {plan.recipe.name}",
        provenance=_provenance(source, {}, command),
        bytes=plan.bytes,
        bits_per_weight=plan.bits_per_weight,
        recipe=plan.recipe.name,
        expected_kld=plan.expected_kld,
        bytes_per_token=bytes_per_token(plan),
        tensors=planned_tensors(plan),
        problems=plan.problems,
    )


def comparison_report(
    reference: Model | OnnxModel,
    models: Sequence[Model | OnnxModel],
    compared: Sequence[Candidate],
    evaluation: Evaluation,
    command: str | None = None,
) -> Report:
    """How models compare with their reference, one in detail, several side by side."""
    from ..convert.conversion import InputFile
    from ..sources.model import Model

    files = {f"evaluation {name}": InputFile.of(file) for name, file in evaluation.texts.items()}
    provenance = _provenance(reference.path.as_posix(), files, command)
    if len(compared) > 1:
        problems = tuple(f"{found.path.name}: {line}" for found in compared for line in found.parity.problems)
        title = f"{len(compared)} candidates"
        return Report("comparison", title, provenance, candidates=tuple(compared), problems=problems)
    (model,), (found,) = models, compared
    return Report(
        kind="comparison",
        title=found.path.name,
        provenance=provenance,
        bytes=found.bytes,
        bits_per_weight=found.bits_per_weight,
        parity=found.parity,
        tensors=stored_tensors(model.graph) if isinstance(model, Model) else (),
        problems=found.parity.problems,
    )


def planned_tensors(plan: Plan, rounding_errors: Mapping[str, float] | None = None) -> tuple[ReportedTensor, ...]:
    """The tensors of a plan in file order."""
    errors = rounding_errors or {}
    return tuple(
        ReportedTensor(
            weight.name,
            weight.role.value,
            weight.layer,
            tensor.type.name,
            weight.elements,
            plan.bytes_of(tensor),
            errors.get(weight.name),
            not weight.may_be_quantized,
        )
        for tensor in plan.tensors
        for weight in (tensor.weight,)
    )


def stored_tensors(graph: Graph) -> tuple[ReportedTensor, ...]:
    """The weights of a model as they are stored."""
    return tuple(
        ReportedTensor(
            weight.name,
            weight.role.value,
            weight.layer,
            first_tensor(weight.source).dtype,
            weight.elements,
            round(weight.elements * weight.source.bits / 8),
            protected=not weight.may_be_quantized,
        )
        for weight in graph.weights()
    )


def _provenance(
    source: str, files: Mapping[str, InputFile], command: str | None, revision: str | None = None
) -> Provenance:
    versions = {"moecast": __version__, "Python": platform.python_version()}
    return Provenance(
        source,
        revision,
        {use: (file.path.name, file.sha256) for use, file in files.items()},
        versions | {library: version(library) for library in _LIBRARIES},
        datetime.now(UTC).isoformat(timespec="seconds"),
        command,
    )
