"""The file formats that a model can be cast into, and the plan of each."""

from __future__ import annotations

from ...archs.graph import Graph
from ...errors import BadInput
from .onnx_plan import onnx_recipe_named, plan_onnx
from .plan import Form, Plan, plan_file
from .recipes import Recipe, recipe_named

DEFAULT_QUANT = {"gguf": "Q4_K_M", "onnx": "Q4_0"}
"""The recipe for each format where nobody asks for another."""


def recipe_for(file_format: str, quant: str | None) -> Recipe:
    """The recipe of this name for a file of the format `file_format`, None for the usual one. Raises BadInput."""
    quant = quant or DEFAULT_QUANT[file_format]
    return recipe_named(quant) if file_format == "gguf" else onnx_recipe_named(quant)


def plan_format(
    file_format: str, graph: Graph, quant: str | None, form: Form = Form(), calibrated: bool = False
) -> Plan:
    """The plan of a file of the format `file_format`; see `plan_file` for the other arguments.

    Raises BadInput for a recipe that the format cannot hold, and for multi-token prediction in ONNX.
    """
    recipe = recipe_for(file_format, quant)
    if file_format == "gguf":
        return plan_file(graph, recipe, form, calibrated)
    if form.mtp:
        raise BadInput("--mtp: an ONNX model has no place for multi-token prediction; leave the option out")
    return plan_onnx(graph, recipe)
