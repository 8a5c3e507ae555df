"""Models cast into ONNX, and into GGUF by the same plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from moecast.convert.gguf.writer import GGUFWriter
from moecast.convert.onepass import Lanes
from moecast.convert.onepass import cast as cast_model
from moecast.convert.onnx.export import open_onnx_writer
from moecast.convert.pipeline import gguf_metadata
from moecast.progress import Silent
from moecast.quant.planning.onnx_plan import OnnxPlan
from moecast.quant.planning.targets import plan_target
from moecast.runner.engines import OnnxModel
from moecast.sources.model import open_model
from torch import Tensor


@dataclass(frozen=True)
class Cast:
    """One plan of one checkpoint as an ONNX folder and as a GGUF file."""

    checkpoint: Path
    plan: OnnxPlan
    folder: Path
    gguf: Path

    def engine(self, low_memory: bool = False) -> OnnxModel:
        return OnnxModel(self.folder, low_memory, threads=1)


def cast(checkpoint: Path, output: Path, quant: str = "Q4_0", activations: str = "float32") -> Cast:
    model = open_model(checkpoint)
    plan = plan_target("onnx", model.graph, quant)
    assert isinstance(plan, OnnxPlan)
    folder, gguf = output / "onnx", output / "model.gguf"
    folder.mkdir(parents=True)
    with open_onnx_writer(model, plan, folder, activations, overwrite=False, verify=True) as writer:
        cast_model(model, plan, writer, Lanes(), Silent(), threads=1)
    metadata = gguf_metadata(model, plan, "model", None, {}, Silent())
    with GGUFWriter(gguf, metadata, plan.tensors) as writer:
        cast_model(model, plan, writer, Lanes(), Silent(), threads=1)
    return Cast(checkpoint, plan, folder, gguf)


def onnx_logits(model: OnnxModel, tokens: Tensor, pieces: int | None = None) -> Tensor:
    """Token ids [tokens] -> [tokens, vocabulary size], fed `pieces` tokens at a time, by default all at once."""
    state = model.initial_state()
    logits = []
    for part in tokens.split(pieces or len(tokens)):
        values, state = model.advance(part, state)
        logits.append(values)
    return torch.cat(logits)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
