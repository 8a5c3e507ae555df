"""GGUF to GGUF: other types for the same weights, in bounded memory."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from ..errors import BadInput
from ..progress import NoProgress, Progress
from ..quant.formats.table import FORMATS
from ..quant.planning.plan import Form, Plan
from ..runner.memory import workspace
from ..runner.settings import Compute
from ..runner.texts import DEFAULT_CONTEXT
from ..sources.hub.access import HubAccess
from ..sources.imatrix import ImportanceMatrix, read_imatrix
from ..sources.locate import locate_imatrix
from ..sources.model import Model, open_model
from .conversion import Conversion, Details, InputFile
from .encode import MeasuredImportance, missing_entries
from .gguf.metadata import QUANTIZATION_VERSION, imatrix_metadata
from .gguf.writer import GGUFWriter
from .onepass import FileToWrite, PassInputs, run_pass
from .plans.choose import plan_for
from .preflight import note_resumption
from .resume.fingerprint import file_identity, fingerprint
from .resume.journal import Journal
from .resume.records import Spent
from .settings import Calibration, Goal

_UNQUANTIZED_BITS = 16


def requantize(
    source: str | Path | Model,
    output: str | Path,
    goal: str | Goal | None = None,
    *,
    imatrix: str | Path | None = None,
    allow_requantize: bool = False,
    compute: Compute = Compute(),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Quantize a GGUF file (open, or the first of a split) to another; options are llama-quantize's.

    Args:
        goal: a recipe name, by default Q4_K_M, or what else types follow from.
        imatrix: importance matrix of llama.cpp, as GGUF or .dat, or one of the Hub, `owner/name/file`.
        allow_requantize: accept tensors that are quantized already; they were rounded once and will be again.

    Raises BadInput for anything wrong with the input, an existing output, or a full disk.
    """
    started = time.monotonic()
    model = source if isinstance(source, Model) else open_model(source)
    if not model.metadata:
        raise BadInput(f"{model.path} is a checkpoint folder, expected a GGUF file: use `moecast convert`")
    progress = progress or NoProgress()
    if imatrix:
        imatrix = locate_imatrix(imatrix, HubAccess(), progress)
    importance = read_imatrix(imatrix).fitted_to(model) if imatrix else None
    plan = plan_requantized(model, goal, imatrix)
    if not allow_requantize:
        _refuse_quantized(model, plan)
    metadata = _metadata(model, plan, importance)
    path = Path(output)
    others = {"importance matrix": file_identity(Path(imatrix))} if imatrix else {}
    with Journal(path, fingerprint(model, plan, metadata, others), overwrite, progress) as journal:
        resumed = journal.continues
        with GGUFWriter(path, metadata, plan.stored, None, overwrite, journal) as writer:
            if resumed:
                note_resumption(writer.bytes_there, plan.bytes, model, progress)
            inputs = PassInputs(importance=MeasuredImportance(importance) if importance else None)
            room = workspace(compute, plan.graph, 0, DEFAULT_CONTEXT)
            files = [FileToWrite(plan, writer)]
            (passed,) = run_pass(model, files, inputs, compute, workspace=room, progress=progress)
    details, spent = Details(plan, passed.findings), journal.earlier + Spent.since(started)
    made = Conversion.of(path, writer.paths, details, model.path.as_posix(), spent)
    missing = missing_entries(importance, plan) if importance else ()
    used = InputFile.of(imatrix) if imatrix else None
    problems = (*made.problems, *writer.problems, *missing)
    return replace(made, problems=problems, imatrix=used, resumed=resumed)


def plan_requantized(model: Model, goal: str | Goal | None, imatrix: str | Path | None) -> Plan:
    """The plan that `requantize` follows: the file's own rows."""
    goal = replace(goal, measure=False) if isinstance(goal, Goal) else Goal(goal)
    return plan_for(model, goal, Form(padding=False), Calibration(text=None, imatrix=imatrix))


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
    return metadata | (imatrix_metadata(importance) if importance else {})
