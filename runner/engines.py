"""Runs an ONNX folder that `convert --to onnx` wrote, in ONNX Runtime."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..archs.config import Config
from ..documents import is_file, read_json
from ..errors import BadInput
from ..paths import inside
from ..sources.model import Model, open_model
from ..sources.tokenizer import Tokenizer
from ..sources.tokenizer_folder import read_tokenizer_folder
from .settings import Opening

if TYPE_CHECKING:
    import onnx

DESCRIPTION_NAME = "moecast.json"
MODEL_NAME = "model.onnx"
_TOKEN_INPUTS = ("input_ids", "position_ids", "attention_mask")
_MOST_SIZE = 1 << 24  # of a dimension in a description
_MOST_DIMENSIONS = 8
_MOST_STATE = 1 << 27  # values
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
        self.context_length: int = self.description["context_length"]
        check_operators(self.description["operators"])
        self.files = model_files(path / MODEL_NAME)
        self._session = _open_session(path / MODEL_NAME, low_memory and not self.description.get("prepacked"), threads)
        self._inputs = {port.name for port in self._session.get_inputs()}
        self._states: list[dict[str, Any]] = self.description["states"]
        self._outputs = ["logits", *(state["output"] for state in self._states)]
        described = {*_TOKEN_INPUTS, *(state["input"] for state in self._states)}
        given = {port.name for port in self._session.get_outputs()}
        if foreign := sorted((self._inputs - described) | ({*self._outputs} - given)):
            raise BadInput(f"{path / DESCRIPTION_NAME} describes another {MODEL_NAME}: {foreign[0]} is not in both")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises BadInput when the folder has none."""
        return read_tokenizer_folder(self.path)

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
        positions, mask = np.arange(seen, seen + count)[None], np.ones((1, seen + count), np.int64)
        known = dict(zip(_TOKEN_INPUTS, (tokens[None].numpy(), positions, mask), strict=True)) | state
        try:
            logits, *states = self._session.run(self._outputs, {name: known[name] for name in self._inputs})
        except Exception as error:  # the library has exceptions of its own, without a common base
            raise BadInput(f"{self.path / MODEL_NAME} cannot be run: {error}") from None
        if logits.shape != (1, count, self.vocabulary_size):
            raise BadInput(f"{self.path / MODEL_NAME} gives {logits.shape[-1]} logits, expected {self.vocabulary_size}")
        following = dict(zip((entry["input"] for entry in self._states), states, strict=True))
        return torch.from_numpy(logits[0]), following | {"tokens": np.asarray(seen + count)}


def open_runnable(path: str | Path, opening: Opening = Opening(), ignored: Collection[str] = ()) -> Model | OnnxModel:
    """A checkpoint folder, a GGUF file or an ONNX folder.

    Raises BadInput as `open_model` and `OnnxModel` do, and where full attention is asked of an ONNX folder.
    """
    path = Path(path)
    if path.name == MODEL_NAME:
        path = path.parent
    full = opening.attention == "full"
    if is_file(path / MODEL_NAME):
        if full:
            raise BadInput(f"{path}: --attention full cannot change an ONNX folder: give the checkpoint or a GGUF file")
        return OnnxModel(path, opening.low_memory)
    model = open_model(path, ignored=ignored)
    return model.attending_to_all() if full else model


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
    """What the folder's description says, checked as far as we use it. Raises BadInput for a folder without one."""
    file = path / DESCRIPTION_NAME
    if not is_file(file):
        raise BadInput(f"{file} is missing: only what `convert --to onnx` wrote can be run")
    values = read_json(file)
    description = Config(values, str(file))
    operators, states = description.get("operators"), description.get("states")
    if not isinstance(operators, list) or not all(isinstance(name, str) for name in operators):
        raise BadInput(f"{file}: operators is {operators!r}, expected a list of names")
    if description.integer("vocabulary_size") > _MOST_SIZE:
        raise BadInput(f"{file}: vocabulary_size is {values['vocabulary_size']}, expected at most {_MOST_SIZE}")
    description.integer("context_length")
    description.flag("prepacked", default=False)
    if not isinstance(states, list):
        raise BadInput(f"{file}: states is {states!r}, expected a list")
    sizes = [_state_size(Config(state if isinstance(state, dict) else {}, f"{file}: a state")) for state in states]
    if sum(sizes) > _MOST_STATE:
        raise BadInput(f"{file}: the states have {sum(sizes)} values, expected at most {_MOST_STATE}")
    return values


def _state_size(state: Config) -> int:
    """The number of values of a state before the first token; raises BadInput where a part of its entry is wrong."""
    for key in ("input", "output"):
        state.text(key)
    fill, shape = state.get("fill"), state.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size <= _MOST_SIZE for size in shape):
        raise BadInput(f"{state.origin}: shape is {shape!r}, expected whole numbers up to {_MOST_SIZE}")
    if len(shape) > _MOST_DIMENSIONS or type(fill) not in (int, float) or math.isnan(fill):
        raise BadInput(f"{state.origin}: it has {len(shape)} dimensions and begins as {fill}, expected a tensor")
    return math.prod(shape)


@dataclass(frozen=True)
class ExternalPlace:
    """Where the data of a tensor lie: a file by its name in the model's folder, and the end in it."""

    file: str
    end: int


def external_place(tensor: onnx.TensorProto, origin: Path) -> ExternalPlace:
    """What a model says of the place of a tensor. Raises BadInput where that is no place in a file of its folder."""
    said = {entry.key: entry.value for entry in tensor.external_data}
    file, numbers = said.get("location", ""), [said.get("offset", "0"), said.get("length", "")]
    inside(origin.parent, file, f"{origin}: {tensor.name}")
    if not all(re.fullmatch(r"[0-9]{1,18}", number) for number in numbers):
        raise BadInput(f"{origin}: {tensor.name} lies at {numbers[0]!r}, {numbers[1]!r} long, expected whole numbers")
    return ExternalPlace(file, sum(map(int, numbers)))


def read_onnx(file: Path) -> onnx.ModelProto:
    """A model without its external data. Raises BadInput where that lies elsewhere than in files of its folder."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(file, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BadInput(f"{file} cannot be read: {error}; convert the model again") from None
    for tensor in _tensors(model.graph):
        if tensor.external_data:
            place = file.parent / external_place(tensor, file).file
            if not is_file(place):
                raise BadInput(f"{place} is missing or no file, although {file.name} names it")
    return model


def model_files(file: Path) -> frozenset[Path]:
    """A model's file and those of its external data. Raises as `read_onnx`."""
    stored = [tensor for tensor in _tensors(read_onnx(file).graph) if tensor.external_data]
    return frozenset((file, *(file.parent / external_place(tensor, file).file for tensor in stored)))


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a graph, also those that are constants of its nodes or lie in graphs within."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


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
