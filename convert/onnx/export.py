"""Opens the ONNX folder of a plan for writing."""

from __future__ import annotations

from pathlib import Path

from ...quant.planning.onnx_plan import OnnxPlan
from ...runner.engines import check_operators
from ...sources.model import Model
from ..resume.journal import Journal
from .files import model_files, operators
from .model import build_model
from .writer import OnnxWriter


def open_onnx_writer(
    model: Model,
    plan: OnnxPlan,
    folder: Path,
    activations: str,
    overwrite: bool,
    verify: bool,
    journal: Journal | None = None,
) -> OnnxWriter:
    """The writer of a plan's weights, with the finished graph and the files around it.

    Args:
        verify: the result will be run here, so make sure that the installed ONNX Runtime can.

    Raises BadInput before anything is written: for a graph that ONNX has no form for, and, to `verify`, for operators
    that ONNX Runtime lacks.
    """
    onnx_model, states = build_model(plan, activations)
    if verify:
        check_operators(operators(onnx_model))
    contents = model_files(onnx_model, states, plan, model.path, model.tokenizer, activations)
    return OnnxWriter(folder, plan, contents, overwrite, journal)
