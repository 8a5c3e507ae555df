"""Adds prepacked weights to an ONNX folder, in the order of this machine's kernels, so that they can be mapped.

When ONNX Runtime loads a model it copies all weights into that order, in memory of its own: a model that does not fit
there cannot run at full speed. The copies can lie in the external data instead, and are mapped from there like
everything else. They are made node by node, in sessions of one node, which write what they would have kept. Another
processor or another version of ONNX Runtime finds that they are not what it would have made, and makes its own.

The copies lie behind the weights in the same files. The model names them only once they are all there, and forgets them
before they are cut off, so that it can be loaded after whatever stops this.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import onnx
from onnx import NodeProto, TensorProto, helper

from ...errors import BadInput, Interrupted
from ...files import sync
from ...paths import inside, own_file
from ...progress import Progress
from ...quant.planning.onnx_plan import ALIGNMENT
from ...runner.engines import DESCRIPTION_NAME, MODEL_NAME, external_place, read_description, read_onnx, runtime

_PACKING_OPERATORS = ("QMoE", "MatMulNBits", "FusedMatMul")
_ENTRY = "prepacked_"  # beginning of the keys of external data that name packed copies
_COPIED = "packed.bin"
_TEMPORARY = ".packing"
_PIECE = 1 << 24  # bytes


def prepack(folder: Path, progress: Progress) -> int:
    """Add packed copies to a folder that `convert --to onnx` wrote; those of an earlier run are replaced.

    Returns the size of the copies in bytes. The model gives the same results before, meanwhile and afterwards. Raises
    BadInput for another kind of folder, or one whose model names other places than the folder's own files, and without
    ONNX Runtime; Interrupted when the folder cannot be written.
    """
    description = read_description(folder)
    model = read_onnx(folder / MODEL_NAME)
    stored = {tensor.name: tensor for tensor in model.graph.initializer if tensor.external_data}
    packing = (node for node in model.graph.node if node.op_type in _PACKING_OPERATORS)
    nodes = [node for node in packing if stored.keys() & {*node.input}]
    ends = _ends(folder, [*stored.values()])
    size = 0
    progress.begin("Packing", len(nodes), "weights")
    try:
        shutil.rmtree(folder / _TEMPORARY, ignore_errors=True)  # what a killed run has left
        if description.get("prepacked"):
            _describe(folder, description, prepacked=False)
        _forget_copies([*stored.values()])
        _replace(folder / MODEL_NAME, model.SerializeToString())
        for file, end in ends.items():
            os.truncate(file, end)
        for node in nodes:
            weights = [stored[name] for name in node.input if name in stored]
            size += _pack(folder, node, weights, model)
            progress.advance(1, node.name)
        _describe(folder, description, prepacked=True)
        _replace(folder / MODEL_NAME, model.SerializeToString())
    except OSError as error:
        raise Interrupted(f"{folder} cannot be written: {error.strerror}; free space and run it again") from None
    return size


def _ends(folder: Path, tensors: Sequence[TensorProto]) -> dict[Path, int]:
    """Where the plain weights of each file end, and copies of an earlier run begin."""
    ends: dict[Path, int] = {}
    for tensor in tensors:
        place = external_place(tensor, folder / MODEL_NAME)
        file = own_file(folder, place.file, f"{folder / MODEL_NAME}: {tensor.name}")
        if place.end > file.stat().st_size:
            raise BadInput(f"{folder / MODEL_NAME}: {tensor.name} ends at byte {place.end} of {file}, beyond its end")
        ends[file] = max(ends.get(file, 0), -(-place.end // ALIGNMENT) * ALIGNMENT)
    return {file: min(end, file.stat().st_size) for file, end in ends.items()}


def _forget_copies(tensors: Sequence[TensorProto]) -> None:
    for tensor in tensors:
        kept = [entry for entry in tensor.external_data if not entry.key.startswith(_ENTRY)]
        del tensor.external_data[:]
        tensor.external_data.extend(kept)


def _pack(folder: Path, node: NodeProto, weights: Sequence[TensorProto], model: onnx.ModelProto) -> int:
    """Append the copies of one node's weights to their files and name them in the tensors; their size."""
    size = 0
    own = {weight.name: weight for weight in weights}
    temporary = folder / _TEMPORARY
    temporary.mkdir()
    packed = _packed_by_runtime(folder, node, weights, model, temporary)
    with (temporary / _COPIED).open("rb") as copies:
        for tensor in packed.graph.initializer:
            place = external_place(own[tensor.name], folder / MODEL_NAME)
            with inside(folder, place.file, folder / MODEL_NAME).open("ab") as file:
                for entry in tensor.external_data:
                    if entry.key.startswith(_ENTRY):
                        value = "|".join(_moved(entry.value, copies, file))
                        own[tensor.name].external_data.add(key=entry.key, value=value)
                        size += sum(int(part.split(";")[1]) for part in value.split("|")[1:])
                file.flush()
                sync(file.fileno())
    shutil.rmtree(temporary)
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
            if not piece:
                raise BadInput(f"ONNX Runtime has written less of {key} than it says: try another version of it")
            target.write(piece)
            left -= len(piece)


def _describe(folder: Path, description: dict[str, Any], prepacked: bool) -> None:
    _replace(folder / DESCRIPTION_NAME, json.dumps(description | {"prepacked": prepacked}, indent=2).encode())


def _replace(file: Path, content: bytes) -> None:
    temporary = file.with_name(f".{file.name}.part")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        sync(stream.fileno())
    os.replace(temporary, file)
