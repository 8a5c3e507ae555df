"""Runs an ONNX folder that `convert --to onnx` wrote, in ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import BadInput
from ..sources.model import Model, open_model
from ..sources.tokenizer import Tokenizer

DESCRIPTION_NAME = "moecast.json"
MODEL_NAME = "model.onnx"
_TOKENS = 256  # in one run: the memory of a longer prompt's scores and logits stays bounded

OnnxState = dict[str, NDArray[Any]]


class OnnxModel:
    """A model in ONNX Runtime.

    Args:
        path: folder with model.onnx and its description.
        low_memory: use the weights where they lie in the file, mapped, instead of copies in the form that the kernels
            like best: loads at once and needs little memory of its own, but computes more slowly. Where those copies
            lie in the file too, they are mapped in any case.
        threads: of ONNX Runtime, all cores by default.

    Raises BadInput when ONNX Runtime is not installed, lacks operators, or cannot load the model.
    """

    def __init__(self, path: Path, low_memory: bool = False, threads: int | None = None) -> None:
        self.path = path
        self.description = read_description(path)
        self.vocabulary_size: int = self.description["vocabulary_size"]
        check_operators(self.description["operators"])
        self._session = _open_session(path / MODEL_NAME, low_memory and not self.description.get("prepacked"), threads)
        self._inputs = {port.name for port in self._session.get_inputs()}
        self._states: list[dict[str, Any]] = self.description["states"]
        self._outputs = ["logits", *(state["output"] for state in self._states)]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises BadInput when the folder has none."""
        return Tokenizer.from_folder(self.path)

    def initial_state(self) -> OnnxState:
        """The state before the first token of a text."""
        state = {entry["input"]: np.full(entry["shape"], entry["fill"], np.float32) for entry in self._states}
        return state | {"tokens": np.asarray(0)}

    def advance(self, tokens: Tensor, state: OnnxState) -> tuple[Tensor, OnnxState]:
        """Token ids int64 [tokens] that follow those the state has seen -> logits [tokens, vocabulary size], state."""
        logits = []
        for part in tokens.split(_TOKENS):
            values, state = self._run(part, state)
            logits.append(values)
        return torch.cat(logits), state

    def _run(self, tokens: Tensor, state: OnnxState) -> tuple[Tensor, OnnxState]:
        seen, count = int(state["tokens"]), len(tokens)
        known = {
            "input_ids": tokens[None].numpy(),
            "position_ids": np.arange(seen, seen + count)[None],
            "attention_mask": np.ones((1, seen + count), np.int64),
        } | state
        logits, *states = self._session.run(self._outputs, {name: known[name] for name in self._inputs})
        following = dict(zip((entry["input"] for entry in self._states), states, strict=True))
        return torch.from_numpy(logits[0]), following | {"tokens": np.asarray(seen + count)}


def open_runnable(path: str | Path, low_memory: bool = False, ignored: Collection[str] = ()) -> Model | OnnxModel:
    """A checkpoint folder, a GGUF file or an ONNX folder. Raises BadInput as `open_model` and `OnnxModel` do."""
    path = Path(path)
    if path.name == MODEL_NAME:
        path = path.parent
    return OnnxModel(path, low_memory) if (path / MODEL_NAME).is_file() else open_model(path, ignored=ignored)


def check_operators(operators: Iterable[str]) -> None:
    """Raises BadInput naming the operators that the installed ONNX Runtime cannot compute, or when there is none."""
    engine = runtime()
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    provider = "CPUExecutionProvider"
    kernels = {f"{k.domain}.{k.op_name}".lstrip(".") for k in state.get_all_opkernel_def() if k.provider == provider}
    missing = sorted({*operators} - kernels)
    if missing:
        raise BadInput(
            f"ONNX Runtime {engine.__version__} cannot compute {', '.join(missing)}: install a newer onnxruntime"
        )


def runtime() -> Any:
    """The module `onnxruntime`. Raises BadInput where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        raise BadInput("ONNX Runtime is not installed: pip install 'moecast[onnx]'") from None
    return onnxruntime


def read_description(path: Path) -> dict[str, Any]:
    """What the folder's description says. Raises BadInput for a folder without one."""
    file = path / DESCRIPTION_NAME
    try:
        description: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{file} cannot be read: {error}; only what `convert --to onnx` wrote can be run") from None
    return description


def _open_session(file: Path, low_memory: bool, threads: int | None) -> Any:
    engine = runtime()
    options = engine.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    if low_memory:
        options.add_session_config_entry("session.disable_prepacking", "1")
    available = engine.get_available_providers()
    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
    try:
        return engine.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # the library has exceptions of its own, without a common base
        raise BadInput(f"{file} cannot be loaded: {error}") from None
