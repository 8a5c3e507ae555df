"""ONNX exports of tiny checkpoints, and our runner with the very numbers that they hold."""

from __future__ import annotations

from pathlib import Path

import torch
from moecast.archs.weights import Weight
from moecast.convert.encode import write_tensors
from moecast.convert.onnx.export import open_onnx_writer
from moecast.quant import dequantize, quantize
from moecast.quant.onnx_plan import OnnxPlan, onnx_recipe_named, plan_onnx
from moecast.runner.onnx_model import OnnxModel
from moecast.sources.model import Model, open_model
from moecast.sources.progress import Silent
from torch import Tensor


class Rounded(Model):
    """A checkpoint whose weights are what a plan makes of them."""

    def __init__(self, model: Model, plan: OnnxPlan) -> None:
        super().__init__(model.path, model.architecture, plan.graph, model.tensors, model.metadata)
        self._types = {tensor.weight.name: tensor.type.name for tensor in plan.tensors}

    def load(self, weight: Weight, expert: int | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        values, type_name = super().load(weight, expert, rows), self._types[weight.name]
        if type_name in ("F32", "I32"):
            return values
        blocks = self.repacked(weight, type_name, expert, rows)
        if blocks is None:
            blocks = quantize(values.view(-1, weight.columns), type_name)
        return dequantize(blocks, type_name).view_as(values)


def export(checkpoint: Path, folder: Path, quant: str = "Q4_0", activations: str = "float32") -> tuple[OnnxModel, Model]:
    """Writes an ONNX folder; returns what runs it, and our runner's model of the same numbers."""
    model = open_model(checkpoint)
    plan = plan_onnx(model.graph, onnx_recipe_named(quant))
    with open_onnx_writer(model, plan, folder, activations, overwrite=False, verify=True) as writer:
        write_tensors(writer, model, plan, Silent())
    return OnnxModel(folder, threads=1), Rounded(model, plan)


def onnx_logits(model: OnnxModel, tokens: Tensor, cuts: list[int] | None = None) -> Tensor:
    """Token ids [tokens] -> logits [tokens, vocabulary], the text cut into pieces at the given places."""
    state, logits = model.initial_state(), []
    for piece in tokens.tensor_split(cuts or []):
        values, state = model.advance(piece, state)
        logits.append(values)
    return torch.cat(logits)


def relative_error(values: Tensor, expected: Tensor) -> float:
    return float((values - expected).norm() / expected.norm())
