"""From a checkpoint to a quantized file, one expert at a time, and the proof that it is what it should be."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import BadInput
from ..progress import NoProgress, Progress
from ..quant.planning.file_formats import plan_format, recipe_for
from ..quant.planning.onnx_plan import OnnxPlan
from ..quant.planning.plan import Plan, plan_tensors
from ..quant.planning.recipes import Recipe
from ..runner.measure.evaluate import (
    CALIBRATION_TEXT,
    DEFAULT_CONTEXT,
    EVALUATION_TEXT,
    Parity,
    chunk_tokens,
    dtype_name,
)
from ..runner.memory import QUANTIZING, RUNNING, peak_rss_bytes, workspace
from ..sources.hub.repository import HubCheckpoint
from ..sources.hub.shards import open_on_demand
from ..sources.imatrix import read_imatrix
from ..sources.locate import model_name
from ..sources.model import Model, open_model
from .encode import MeasuredImportance
from .gguf.imatrix import ImatrixWriter
from .gguf.tokenizer import tokenizer_metadata
from .gguf.writer import GGUFWriter
from .onepass import PassInputs, run_pass
from .onnx.export import open_onnx_writer
from .preflight import check_disk
from .resume.fingerprint import file_identity, fingerprint, text_identity
from .resume.journal import Journal, journal_folder
from .writer import Writer

_ROUNDED_ACTIVATIONS = (
    "compared as if activations stayed in float32; ONNX Runtime rounds them to 8 bits: `moecast parity` runs it"
)
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

    @classmethod
    def of(cls, files: Sequence[Path], plan: Plan, started: float, parity: Parity | None = None) -> Conversion:
        """The conversion to finished `files` that began when `time.monotonic()` was `started`."""
        return cls(
            files=tuple(files),
            bytes=sum(file.stat().st_size for file in files),
            bits_per_weight=plan.bits_per_weight,
            parity=parity,
            problems=plan.problems,
            seconds=time.monotonic() - started,
            peak_rss_bytes=peak_rss_bytes(),
        )


def convert(
    source: str | Path | HubCheckpoint | Model,
    output: str | Path = ".",
    quant: str | Plan | None = None,
    *,
    file_format: str = "gguf",
    activations: str | None = None,
    padding: bool = True,
    mtp: bool | None = None,
    name: str | None = None,
    pre: str | None = None,
    split_max_bytes: int | None = None,
    overwrite: bool = False,
    calibration: str | Path | None = CALIBRATION_TEXT,
    imatrix: str | Path | None = None,
    imatrix_out: str | Path | None = None,
    min_expert_tokens: int = 0,
    verify: bool = True,
    file: str | Path = EVALUATION_TEXT,
    context: int = DEFAULT_CONTEXT,
    chunks: int | None = 16,
    threads: int | None = None,
    memory: int | None = None,
    compute_dtype: torch.dtype = torch.float32,
    error_feedback: bool = False,
    scratch: int | None = None,
    provenance: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a checkpoint to GGUF or ONNX.

    Args:
        source: checkpoint folder, or a commit on the Hub, whose shards are fetched when they are needed; or an open
            model, which is closed in the end.
        output: a .gguf file, or a folder for `<name>-<quant>.gguf` or the folder `<name>-<quant>-onnx`.
        quant: a recipe name: Q4_K_M, Q8_0, BF16, ..., or native for what the checkpoint itself holds; Q4_K_M by
            default, for ONNX Q4_0. Or a plan for the model's graph, to which `padding` and `mtp` do not apply.
        file_format: gguf or onnx.
        activations: what ONNX Runtime rounds activations to before it multiplies: int8 (fast, the default) or float32.
        padding: fill rows up with zeros where the recipe's blocks demand it, instead of falling back to other types.
        mtp: keep the blocks of multi-token prediction; by default, unless they rule out padding. Where they are a
            draft of their own they make a second file, `<file>-mtp.gguf`.
        name: the model's name, by default that of the folder or repository.
        pre: llama.cpp's name of the text splitter, by default the architecture's.
        split_max_bytes: start a new file when the data section would grow beyond this.
        overwrite: replace an existing output.
        calibration: the text, in chunks of `context` tokens, that shows which inputs of a weight matter; None weighs
            all alike. Types of 8 bits and more do without.
        imatrix: an importance matrix of llama.cpp, instead of calibration.
        imatrix_out: where to write what calibration found, as llama.cpp's importance matrix.
        min_expert_tokens: calibration tokens that every expert must have seen; by default those that saw few borrow
            from the layer's others.
        verify: compare the result with the source on `file`, `chunks` chunks of `context` tokens.
        memory: most bytes this process may take; activations that do not fit go to a scratch file beside the output.
            The result does not depend on it. By default all of them stay in memory.
        compute_dtype: what calibration and comparison compute products with weights in; bfloat16 is faster.
        error_feedback: round weights so that each makes good what the rounding of those before it did to the outputs
            (`quant.feedback`), which takes calibration text, and longer.
        scratch: most bytes of shards from the Hub on disk; by default twice what a layer needs.
        provenance: further facts about the source to store in the file.

    A journal beside the output records what is done: stopped by whatever means, the same call continues.

    Raises BadInput for anything wrong with the input or an existing output; then nothing is left under the output's
    name. Raises Interrupted for a full disk or a lost connection.
    """
    started = time.monotonic()
    progress = progress or NoProgress()
    recipe = quant.recipe if isinstance(quant, Plan) else recipe_for(file_format, quant)
    weighs = (quant if isinstance(quant, Plan) else recipe).wants_importance
    name = name or model_name(source)
    provenance = provenance or (source.provenance if isinstance(source, HubCheckpoint) else {})
    measured = read_imatrix(Path(imatrix)) if imatrix else None
    text = None if measured or not (imatrix_out or weighs) else calibration
    if imatrix_out and not text:
        raise BadInput("--imatrix-out writes what calibration finds: leave out --imatrix and --no-calibration")
    check_error_feedback(error_feedback, calibration, imatrix)
    if file_format == "onnx":
        _refuse("an ONNX model", {"--pre": pre, "--split-max-size": split_max_bytes})
        activations = activations or "int8"
    else:
        _refuse("a GGUF file", {"--activations": activations})
    path = output_path(Path(output), name, recipe.name, file_format)
    model = _open(source, scratch, path)
    if isinstance(quant, Plan):
        plan = quant
    else:
        plan = plan_format(file_format, model.graph, quant, padding, mtp, calibrated=bool(measured or text))
    metadata = {} if file_format == "onnx" else gguf_metadata(model, plan, name, pre, provenance, progress)
    lanes = PassInputs(
        chunk_tokens(model.tokenizer, Path(text), context, None) if text else None,
        chunk_tokens(model.tokenizer, Path(file), context, chunks) if verify else None,
    )
    texts = {
        "importance matrix": file_identity(Path(imatrix)) if imatrix else "none",
        "calibration": text_identity(text, lanes.calibration),
        "evaluation": text_identity(file, lanes.evaluation),
        "the type of products": dtype_name(compute_dtype),
        "error feedback": "yes" if error_feedback else "no",
    }
    identity = fingerprint(model, plan, metadata, texts, split_max_bytes, activations)
    copies = QUANTIZING if verify else RUNNING
    room = workspace(memory, plan.graph, lanes.tokens, context, path.parent, copies, error_feedback)
    with closing(model), Journal(path, identity, overwrite) as journal, ExitStack() as stack:
        check_disk(path, plan, model, lanes, memory, journal, progress)
        found = None
        if imatrix_out and text and lanes.calibration is not None:
            found = ImatrixWriter(Path(imatrix_out), Path(text), lanes.calibration, overwrite)
            stack.enter_context(found)
        with _writer(model, plan, path, metadata, split_max_bytes, activations, overwrite, verify, journal) as writer:
            importance = MeasuredImportance(measured) if measured else None
            result = run_pass(
                model,
                plan,
                writer,
                lanes,
                progress,
                importance=importance,
                imatrix=found,
                threads=threads,
                journal=journal,
                workspace=room,
                min_expert_tokens=min_expert_tokens,
                compute_dtype=compute_dtype,
                error_feedback=error_feedback,
            )
        files = [*writer.paths]
        if mtp and model.graph.draft:
            files.append(_write_draft(model, plan.recipe, path, metadata, overwrite, journal, threads, progress))
    made = Conversion.of(files, plan, started, result)
    return replace(made, problems=(*made.problems, _ROUNDED_ACTIVATIONS)) if result and activations == "int8" else made


def _writer(
    model: Model,
    plan: Plan,
    path: Path,
    metadata: dict[str, Any],
    split_max_bytes: int | None,
    activations: str | None,
    overwrite: bool,
    verify: bool,
    journal: Journal,
) -> Writer:
    if isinstance(plan, OnnxPlan):
        return open_onnx_writer(model, plan, path, activations or "int8", overwrite, verify, journal)
    return GGUFWriter(path, metadata, plan.tensors, split_max_bytes, overwrite, journal)


def check_error_feedback(error_feedback: bool, calibration: str | Path | None, imatrix: str | Path | None) -> None:
    """Raises BadInput for error feedback without a calibration text."""
    if error_feedback and (imatrix or not calibration):
        raise BadInput("--error-feedback needs calibration text: leave out --imatrix and --no-calibration")


def _refuse(what: str, options: dict[str, object]) -> None:
    for option, value in options.items():
        if value is not None:
            raise BadInput(f"{option} means nothing for {what}; leave it out")


def _open(source: str | Path | HubCheckpoint | Model, scratch: int | None, output: Path) -> Model:
    if isinstance(source, HubCheckpoint):
        return open_on_demand(source, scratch, journal_folder(output) / "shards")
    model = source if isinstance(source, Model) else open_model(source)
    if model.metadata:
        raise BadInput(f"{model.path} is a GGUF file, expected a checkpoint folder")
    return model


def _write_draft(
    model: Model,
    recipe: Recipe,
    path: Path,
    metadata: dict[str, Any],
    overwrite: bool,
    journal: Journal,
    threads: int | None,
    progress: Progress,
) -> Path:
    assert model.graph.draft and model.architecture.draft_metadata
    plan = plan_tensors(model.graph.draft, recipe)
    metadata = metadata | dict(model.architecture.draft_metadata(model.graph))
    path = path.with_name(f"{path.stem}-mtp.gguf")
    with GGUFWriter(path, metadata, plan.tensors, None, overwrite, journal) as writer:
        run_pass(model, plan, writer, PassInputs(), progress, threads=threads)
    return path


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


def output_path(output: Path, name: str, quant: str, file_format: str) -> Path:
    """The GGUF file or the ONNX folder, in a folder that exists."""
    if file_format == "onnx":
        folder = path = output / f"{name}-{quant}-onnx"
    else:
        path = output if output.suffix == ".gguf" else output / f"{name}-{quant}.gguf"
        folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder} cannot be made: {error.strerror}; choose another --output") from None
    return path
