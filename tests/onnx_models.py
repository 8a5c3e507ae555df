"""Models cast into ONNX, and into GGUF by the same plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from moecast.convert.gguf.metadata import gguf_metadata
from moecast.convert.gguf.writer import GGUFWriter
from moecast.convert.onepass import FileToWrite, run_pass
from moecast.convert.onnx.export import open_onnx_writer
from moecast.progress import NoProgress
from moecast.quant.planning.file_formats import plan_format
from moecast.quant.planning.onnx_plan import OnnxPlan
from moecast.runner.engines import OnnxModel
from moecast.runner.settings import Compute
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
    plan = plan_format("onnx", model.graph, quant)
    assert isinstance(plan, OnnxPlan)
    folder, gguf = output / "onnx", output / "model.gguf"
    folder.mkdir(parents=True)
    with open_onnx_writer(model, plan, folder, activations, overwrite=False, verify=True) as writer:
        run_pass(model, [FileToWrite(plan, writer)], compute=Compute(threads=1))
    metadata = gguf_metadata(model, plan, "model", None, {}, NoProgress())
    with GGUFWriter(gguf, metadata, plan.stored) as writer:
        run_pass(model, [FileToWrite(plan, writer)], compute=Compute(threads=1))
    return Cast(checkpoint, plan, folder, gguf)


def onnx_logits(model: OnnxModel, tokens: Tensor, pieces: int | None = None) -> Tensor:
    """Token ids [tokens] -> [tokens, vocabulary size], fed `pieces` tokens at a time, by default all at once."""
    state = model.initial_state()
    logits = []
    for part in tokens.split(pieces or len(tokens)):
        values, state = model.advance(part, state)
        logits.append(values)
    return torch.cat(logits)
