"""From a checkpoint to a quantised file, one expert at a time, and the proof that it is what it should be."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..archs.errors import BadInput
from ..archs.weights import Weight, first_tensor, of_expert
from ..quant import quantize
from ..quant.plan import Plan, PlannedTensor, plan_file
from ..quant.recipes import recipe_named
from ..runner.evaluate import DEFAULT_CONTEXT, EVALUATION_TEXT, Parity, parity
from ..sources.model import Model, open_model
from ..sources.progress import Progress, Silent
from .gguf_tokenizer import tokenizer_metadata
from .gguf_writer import GGUFWriter

_PIECE_ELEMENTS = 1 << 23  # rows of a plain matrix are taken in pieces of about this many numbers (32 MB)
QUANTIZATION_VERSION = 2  # of ggml's block formats, as general.quantization_version


@dataclass(frozen=True)
class Conversion:
    """What a conversion made.

    Attributes:
        files: the finished files, in split order.
        bytes: their size together.
        bits_per_weight: size of the weights alone.
        parity: the comparison with the source, None when verification was skipped.
        problems: what the plan warned about.
        peak_rss_bytes: this process's largest resident memory so far.
    """

    files: tuple[Path, ...]
    bytes: int
    bits_per_weight: float
    parity: Parity | None
    problems: tuple[str, ...]
    seconds: float
    peak_rss_bytes: int


def convert(
    source: str | Path,
    output: str | Path = ".",
    quant: str = "Q4_K_M",
    *,
    padding: bool = True,
    mtp: bool | None = None,
    name: str | None = None,
    pre: str | None = None,
    split_max_bytes: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
    file: str | Path = EVALUATION_TEXT,
    context: int = DEFAULT_CONTEXT,
    chunks: int | None = 16,
    threads: int | None = None,
    provenance: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a checkpoint folder to GGUF.

    Args:
        source: checkpoint folder.
        output: a .gguf file, or a folder for `<name>-<quant>.gguf`.
        quant: a recipe name: Q4_K_M, Q8_0, BF16, ...
        padding: fill rows up with zeros where the recipe's blocks demand it, instead of falling back to other types.
        mtp: keep the blocks of multi-token prediction; by default, unless they rule out padding.
        name: the model's name, by default that of the folder.
        pre: llama.cpp's name of the text splitter, by default the architecture's.
        split_max_bytes: start a new file when the data section would grow beyond this.
        overwrite: replace an existing output.
        verify: compare the result with the source on `file`, `chunks` chunks of `context` tokens.
        provenance: further facts about the source to store in the file.

    Raises BadInput for anything wrong with the input, an existing output, or a full disk; then nothing is left
    under the output's name.
    """
    started = time.monotonic()
    progress = progress or Silent()
    model = open_model(source)
    if model.metadata:
        raise BadInput(f"{source} is a GGUF file, expected a checkpoint folder")
    name = name or model.path.resolve().name
    plan = plan_file(model.graph, recipe_named(quant), padding, mtp)
    path = _output_path(Path(output), name, plan.recipe.name)
    metadata = gguf_metadata(model, plan, name, pre, provenance or {}, progress)
    files = _write(model, plan, path, metadata, split_max_bytes, overwrite, threads, progress)
    result = parity(model, files[0], file, context, chunks, progress) if verify else None
    return Conversion(
        files=tuple(files),
        bytes=sum(file.stat().st_size for file in files),
        bits_per_weight=plan.bits_per_weight,
        parity=result,
        problems=plan.problems,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
    )


def gguf_metadata(
    model: Model, plan: Plan, name: str, pre: str | None, provenance: dict[str, str], progress: Progress
) -> dict[str, Any]:
    """All keys of the file: general, architecture, tokenizer, and where it came from."""
    tokenizer = tokenizer_metadata(
        model.tokenizer, model.graph.vocabulary_size, pre, model.architecture.pre_tokenizer, progress
    )
    general = {
        "general.architecture": plan.graph.architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": plan.recipe.file_type,
        "general.quantization_version": QUANTIZATION_VERSION,
        "moecast.version": __version__,
        "moecast.quant": plan.recipe.name,
    }
    source = {f"moecast.source.{key}": value for key, value in provenance.items()}
    return {**general, **source, **model.architecture.gguf_metadata(plan.graph), **tokenizer}


def _output_path(output: Path, name: str, quant: str) -> Path:
    path = output if output.suffix == ".gguf" else output / f"{name}-{quant}.gguf"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{path.parent} cannot be made: {error.strerror}; choose another --output") from None
    return path


def _write(
    model: Model,
    plan: Plan,
    path: Path,
    metadata: dict[str, Any],
    split_max_bytes: int | None,
    overwrite: bool,
    threads: int | None,
    progress: Progress,
) -> list[Path]:
    progress.begin("Converting", sum(tensor.weight.elements for tensor in plan.tensors), "weights")
    with GGUFWriter(path, metadata, plan.tensors, split_max_bytes, overwrite) as writer:
        for tensor in plan.tensors:
            for expert, rows in pieces(tensor.weight):
                first_row, data = _quantized(model, tensor, expert, rows, threads)
                writer.write(tensor.weight.name, first_row, data)
                progress.advance(data.shape[0] * tensor.weight.columns, f"{tensor.weight.name} {tensor.type.name}")
    return writer.paths


def pieces(weight: Weight) -> Iterator[tuple[int | None, tuple[int, int] | None]]:
    """How a weight is taken through memory: expert by expert, or some rows at a time; vectors whole."""
    if weight.experts is not None:
        yield from ((expert, None) for expert in range(weight.experts))
    elif len(weight.shape) == 1:
        yield None, None
    else:
        step = max(1, _PIECE_ELEMENTS // weight.columns)
        yield from ((None, (row, min(row + step, weight.shape[0]))) for row in range(0, weight.shape[0], step))


def _quantized(
    model: Model, tensor: PlannedTensor, expert: int | None, rows: tuple[int, int] | None, threads: int | None
) -> tuple[int, Any]:
    """One piece in its stored form: its first row within the whole tensor, and uint8 [rows, row bytes]."""
    weight = tensor.weight
    first_row = expert * weight.shape[-2] if expert is not None else (rows[0] if rows else 0)
    data = model.repacked(weight, tensor.type.name, expert, rows)
    if data is not None:
        return first_row, data
    values = model.load(weight, expert, rows).view(-1, weight.columns)
    if tensor.type.name == "I32":
        return first_row, values.to(torch.int32).view(torch.uint8)  # whole numbers are exact in float32 up to 2^24
    try:
        return first_row, quantize(values, tensor.type.name, threads=threads)
    except BadInput as error:
        stored = first_tensor(of_expert(weight.source, expert))
        raise BadInput(f"{stored.name} in {stored.file}: {error}; the checkpoint is damaged, fetch it again") from None


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far."""
    try:  # getrusage would count the parent that forked us as well
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
