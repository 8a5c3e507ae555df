"""Weights in the order that this machine's kernels like best, stored beside the plain ones.

When ONNX Runtime loads a model it copies all weights into that order, in memory of its own: a model that does not fit
there cannot run at full speed. The copies can lie in the external data instead, and are mapped from there like
everything else. They are made node by node, in sessions of one node, which write what they would have kept. Another
processor or another version of ONNX Runtime finds that they are not what it would have made, and makes its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import onnx
from onnx import NodeProto, TensorProto, helper

from ...errors import BadInput
from ...progress import Progress
from ...quant.planning.onnx_plan import ALIGNMENT
from ...runner.engines import DESCRIPTION_NAME, MODEL_NAME, read_description, runtime

_PACKING_OPERATORS = ("QMoE", "MatMulNBits", "FusedMatMul")
_ENTRY = "prepacked_"  # beginning of the keys of external data that name packed copies
_COPIED = "packed.bin"
_PIECE = 1 << 24  # bytes


def prepack(folder: Path, progress: Progress) -> int:
    """Add packed copies to a folder that `convert --to onnx` wrote; those of an earlier run are replaced.

    Returns the size of the copies in bytes. The model can be used until the end, and afterwards gives the same results.
    Raises BadInput for another kind of folder, without ONNX Runtime, and when the folder cannot be written.
    """
    description = read_description(folder)
    try:
        model = onnx.load(folder / MODEL_NAME, load_external_data=False)
    except Exception as error:  # the library's own are not exported
        raise BadInput(f"{folder / MODEL_NAME} cannot be read: {error}; convert the model again") from None
    stored = {tensor.name: tensor for tensor in model.graph.initializer if tensor.external_data}
    packing = (node for node in model.graph.node if node.op_type in _PACKING_OPERATORS)
    nodes = [node for node in packing if stored.keys() & {*node.input}]
    size = 0
    progress.begin("Packing", len(nodes), "weights")
    try:
        _cut(folder, [*stored.values()])
        for node in nodes:
            weights = [stored[name] for name in node.input if name in stored]
            size += _pack(folder, node, weights, model)
            progress.advance(1, node.name)
        _replace(folder / MODEL_NAME, model.SerializeToString())
        _replace(folder / DESCRIPTION_NAME, json.dumps(description | {"prepacked": True}, indent=2).encode())
    except OSError as error:
        raise BadInput(f"{folder} cannot be written: {error.strerror}; free space and run it again") from None
    return size


def _cut(folder: Path, tensors: Sequence[TensorProto]) -> None:
    """Forget the copies of an earlier run, which begin where the plain weights of a file end."""
    ends: dict[str, int] = {}
    for tensor in tensors:
        places = {entry.key: entry.value for entry in tensor.external_data}
        kept = [entry for entry in tensor.external_data if not entry.key.startswith(_ENTRY)]
        del tensor.external_data[:]
        tensor.external_data.extend(kept)
        end = int(places["offset"]) + int(places["length"])
        ends[places["location"]] = max(ends.get(places["location"], 0), -(-end // ALIGNMENT) * ALIGNMENT)
    for name, end in ends.items():
        os.truncate(folder / name, end)


def _pack(folder: Path, node: NodeProto, weights: Sequence[TensorProto], model: onnx.ModelProto) -> int:
    """Append the copies of one node's weights to their files and name them in the tensors; their size."""
    size = 0
    own = {weight.name: weight for weight in weights}
    with TemporaryDirectory(dir=folder, prefix=".packing-") as temporary:
        packed = _packed_by_runtime(folder, node, weights, model, Path(temporary))
        with (Path(temporary) / _COPIED).open("rb") as copies:
            for tensor in packed.graph.initializer:
                location = next(entry.value for entry in own[tensor.name].external_data if entry.key == "location")
                with (folder / location).open("ab") as file:
                    for entry in tensor.external_data:
                        if entry.key.startswith(_ENTRY):
                            value = "|".join(_moved(entry.value, copies, file))
                            own[tensor.name].external_data.add(key=entry.key, value=value)
                            size += sum(int(part.split(";")[1]) for part in value.split("|")[1:])
                    file.flush()
                    os.fsync(file.fileno())
    return size


def _packed_by_runtime(
    folder: Path, node: NodeProto, weights: Sequence[TensorProto], model: onnx.ModelProto, output: Path
) -> onnx.ModelProto:
    """A model of one node, as ONNX Runtime saves it with the copies that it made."""
    names = {weight.name for weight in weights}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in {*node.input} - names - {""}]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    graph = helper.make_graph([node], "node", inputs, outputs, weights)
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    options = runtime().SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = runtime().GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(output / MODEL_NAME)
    for key, value in {
        "session.save_external_prepacked_constant_initializers": "1",
        "session.optimized_model_external_initializers_file_name": _COPIED,
        "session.optimized_model_external_initializers_min_size_in_bytes": "0",
        "session.model_external_initializers_file_folder_path": str(folder),
    }.items():
        options.add_session_config_entry(key, value)
    runtime().InferenceSession(alone.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(output / MODEL_NAME, load_external_data=False)


def _moved(value: str, source: BinaryIO, target: BinaryIO) -> Iterator[str]:
    """Copy what an entry `<key>|<offset>;<length>;<checksum>|...` names; the parts of the entry for the copies."""
    key, *parts = value.split("|")
    yield key
    for part in parts:
        offset, length, checksum = part.split(";")
        target.write(bytes(-target.tell() % ALIGNMENT))
        yield f"{target.tell()};{length};{checksum}"
        source.seek(int(offset))
        left = int(length)
        while left:
            piece = source.read(min(left, _PIECE))
            target.write(piece)
            left -= len(piece)


def _replace(file: Path, content: bytes) -> None:
    temporary = file.with_name(f".{file.name}.part")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
