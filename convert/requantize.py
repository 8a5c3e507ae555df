"""GGUF to GGUF: other types for the same weights, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import BadInput
from ..progress import Progress
from ..quant.formats.table import FORMATS
from ..quant.planning.plan import Form, Plan, override_types
from ..runner.settings import Compute
from ..sources.imatrix import ImportanceMatrix, read_imatrix
from ..sources.model import Model, open_model
from .conversion import Conversion, InputFile
from .encode import MeasuredImportance, missing_entries
from .gguf.metadata import QUANTIZATION_VERSION
from .gguf.writer import GGUFWriter
from .onepass import PassInputs, run_pass
from .plans.choose import plan_for
from .resume.fingerprint import file_identity, fingerprint
from .resume.journal import Journal
from .settings import Calibration, Goal

_UNQUANTIZED_BITS = 16


@dataclass(frozen=True)
class Exceptions:
    """What is not as the recipe or the rules say.

    Attributes:
        tensor_types: (regular expression, type) pairs that overrule the recipe for matching tensor names.
        allow_requantize: accept tensors that are quantized already; they were rounded once and will be again.
    """

    tensor_types: Sequence[tuple[str, str]] = ()
    allow_requantize: bool = False


def requantize(
    source: str | Path | Model,
    output: str | Path,
    goal: str | Goal | None = None,
    *,
    imatrix: str | Path | None = None,
    exceptions: Exceptions = Exceptions(),
    compute: Compute = Compute(),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Quantize a GGUF file (open, or the first of a split) to another; options are llama-quantize's.

    Args:
        goal: a recipe name, by default Q4_K_M, or what else types follow from.
        imatrix: importance matrix of llama.cpp, as GGUF or .dat.

    Raises BadInput for anything wrong with the input, an existing output, or a full disk.
    """
    started = time.monotonic()
    model = source if isinstance(source, Model) else open_model(source)
    if not model.metadata:
        raise BadInput(f"{model.path} is a checkpoint folder, expected a GGUF file: use `moecast convert`")
    importance = read_imatrix(Path(imatrix)).fitted_to(model) if imatrix else None
    plan = plan_requantized(model, goal, imatrix, exceptions)
    if not exceptions.allow_requantize:
        _refuse_quantized(model, plan)
    metadata = _metadata(model, plan, importance)
    path = Path(output)
    others = {"importance matrix": file_identity(Path(imatrix))} if imatrix else {}
    with (
        Journal(path, fingerprint(model, plan, metadata, others), overwrite, progress) as journal,
        GGUFWriter(path, metadata, plan.stored, None, overwrite, journal) as writer,
    ):
        inputs = PassInputs(importance=MeasuredImportance(importance) if importance else None)
        run_pass(model, plan, writer, inputs, compute, progress=progress)
    made = Conversion.of(writer.paths, plan, model.path.as_posix(), started)
    missing = missing_entries(importance, plan) if importance else ()
    used = InputFile.of(imatrix) if imatrix else None
    return replace(made, problems=(*made.problems, *writer.problems, *missing), imatrix=used)


def plan_requantized(
    model: Model, goal: str | Goal | None, imatrix: str | Path | None, exceptions: Exceptions = Exceptions()
) -> Plan:
    """The plan that `requantize` follows: the file's own rows, with the user's exceptions."""
    goal = replace(goal, measure=False) if isinstance(goal, Goal) else Goal(goal)
    plan = plan_for(model, goal, Form(padding=False), Calibration(text=None, imatrix=imatrix))
    return override_types(plan, exceptions.tensor_types)


def _refuse_quantized(model: Model, plan: Plan) -> None:
    stored = {tensor.name: tensor for tensor in model.tensors}
    for tensor in plan.tensors:
        source = stored[tensor.weight.name]
        if source.dtype != tensor.type.name and FORMATS[source.dtype].bits_per_weight < _UNQUANTIZED_BITS:
            raise BadInput(
                f"{source.name} in {source.file} is {source.dtype} already: quantize the original instead, or accept "
                "a second rounding with --allow-requantize"
            )


def _metadata(model: Model, plan: Plan, importance: ImportanceMatrix | None) -> dict[str, object]:
    kept = {key: value for key, value in model.metadata.items() if not key.startswith(("split.", "quantize.imatrix."))}
    metadata = kept | {"general.file_type": plan.recipe.file_type, "general.quantization_version": QUANTIZATION_VERSION}
    if importance:
        metadata |= {
            "quantize.imatrix.file": importance.file,
            "quantize.imatrix.dataset": ", ".join(importance.datasets),
            "quantize.imatrix.entries_count": len(importance.means),
            "quantize.imatrix.chunks_count": importance.chunks,
        }
    return metadata
