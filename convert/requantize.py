"""GGUF to GGUF: other types for the same weights, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import BadInput
from ..progress import NoProgress, Progress
from ..quant.formats.table import FORMATS
from ..quant.planning.plan import Plan, override_types, plan_tensors
from ..quant.planning.recipes import recipe_named
from ..sources.imatrix import ImportanceMatrix, read_imatrix
from ..sources.model import Model, open_model
from .encode import MeasuredImportance
from .gguf.writer import GGUFWriter
from .onepass import PassInputs, run_pass
from .pipeline import QUANTIZATION_VERSION, Conversion
from .resume.fingerprint import file_identity, fingerprint
from .resume.journal import Journal

_UNQUANTIZED_BITS = 16


def requantize(
    source: str | Path | Model,
    output: str | Path,
    quant: str | Plan = "Q4_K_M",
    *,
    imatrix: str | Path | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
    allow_requantize: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Quantize a GGUF file (open, or the first of a split) as a recipe or plan says; options are llama-quantize's.

    Args:
        imatrix: importance matrix of llama.cpp, as GGUF or .dat.
        tensor_types: (regular expression, type) pairs that overrule the recipe for matching tensor names.
        allow_requantize: accept tensors that are quantized already; they were rounded once and will be again.

    Raises BadInput for anything wrong with the input, an existing output, or a full disk.
    """
    started = time.monotonic()
    progress = progress or NoProgress()
    model = source if isinstance(source, Model) else open_model(source)
    if not model.metadata:
        raise BadInput(f"{model.path} is a checkpoint folder, expected a GGUF file: use `moecast convert`")
    importance = read_imatrix(Path(imatrix)) if imatrix else None
    plan = plan_requantized(model, quant, tensor_types, importance is not None)
    if not allow_requantize:
        _refuse_quantized(model, plan)
    metadata = _metadata(model, plan, importance)
    path = Path(output)
    others = {"importance matrix": file_identity(Path(imatrix))} if imatrix else {}
    with (
        Journal(path, fingerprint(model, plan, metadata, others), overwrite, progress) as journal,
        GGUFWriter(path, metadata, plan.tensors, None, overwrite, journal) as writer,
    ):
        measured = MeasuredImportance(importance) if importance else None
        run_pass(model, plan, writer, PassInputs(), progress, measured, threads=threads)
    return Conversion.of(writer.paths, plan, started)


def plan_requantized(
    model: Model, quant: str | Plan, tensor_types: Sequence[tuple[str, str]], calibrated: bool
) -> Plan:
    """The types of a recipe or a plan with the user's exceptions."""
    plan = quant if isinstance(quant, Plan) else plan_tensors(model.graph, recipe_named(quant), calibrated)
    return override_types(plan, tensor_types)


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
