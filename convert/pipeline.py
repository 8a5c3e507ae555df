"""From a checkpoint to a quantized file, one expert at a time, and the proof that it is what it should be."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import BadInput
from ..progress import NoProgress, Progress
from ..quant.planning.onnx_plan import OnnxPlan
from ..quant.planning.plan import Form, Plan, plan_tensors
from ..runner.activations import Workspace
from ..runner.measure.evaluate import Parity
from ..runner.measure.tokenization import Tokenization, compare_tokenizers
from ..runner.memory import QUANTIZING, RUNNING, workspace
from ..runner.settings import Compute, Evaluation
from ..runner.texts import beyond_context
from ..sources.hub.access import HubAccess
from ..sources.imatrix import read_imatrix, source_in
from ..sources.locate import Source, locate_imatrix, open_source
from ..sources.model import Model
from ..sources.tokenizer import Tokenizer
from .conversion import Conversion, Details, InputFile, Reused
from .decisions import decisions
from .encode import MeasuredImportance, missing_entries
from .findings import Findings
from .gguf.imatrix import ImatrixWriter, Origin
from .gguf.metadata import gguf_metadata, imatrix_metadata, source_metadata
from .gguf.tokenizer import tokenizer_problems, written_tokenizer
from .gguf.writer import GGUFWriter
from .onepass import PassInputs, run_pass
from .onnx.export import open_onnx_writer
from .plans.choose import calibration_for, plan_for, with_error_feedback
from .plans.measured import measured_plan
from .preflight import check_disk, note_resumption
from .resume.fingerprint import code_digest, file_identity, fingerprint, source_identity, text_identity
from .resume.journal import Journal, journal_folder, require_free
from .resume.records import Spent
from .resume.sidecar import MadeFrom, Measured, importance_facts, keep_fingerprints
from .reuse import EarlierFile, Reuse, fetch_only_needed, fingerprints_of
from .settings import VERIFICATION, Calibration, Goal, Output
from .writer import Writer

_log = logging.getLogger(__name__)
_ROUNDED_ACTIVATIONS = (
    "compared as if activations stayed in float32; ONNX Runtime rounds them to 8 bits: `moecast parity` runs it"
)


def convert(
    source: str | Path | Model,
    output: str | Path | Output = ".",
    goal: str | Goal | None = None,
    *,
    form: Form = Form(),
    calibration: Calibration = Calibration(),
    evaluation: Evaluation | None = VERIFICATION,
    compute: Compute = Compute(),
    access: HubAccess = HubAccess(),
    progress: Progress | None = None,
) -> Conversion:
    """Convert a checkpoint to GGUF or ONNX: all that `moecast convert` does.

    Args:
        source: checkpoint folder, Hub id, hf:// or https:// address, or an open model, which is closed in the end.
        output: a path, or where, what and how to write.
        goal: a recipe name such as Q4_K_M, the default for GGUF, or what else the types of weights follow from.
        evaluation: on what to compare the result with the source; None for no comparison.

    A journal beside the output records what is done: stopped by whatever means, the same call continues.

    Raises BadInput for anything wrong with the input or an existing output; then nothing is left under the output's
    name. Raises Interrupted for a full disk or a lost connection.
    """
    started = time.monotonic()
    output = output if isinstance(output, Output) else Output(output)
    goal = goal if isinstance(goal, Goal) else Goal(goal)
    progress = progress or NoProgress()
    calibration = with_error_feedback(calibration, goal)
    earlier = EarlierFile(Path(output.reuse)) if output.reuse else None
    with ExitStack() as stack:
        opened = _open(source, access, goal, progress)
        model = opened.model
        stack.callback(model.close)
        if calibration.imatrix:
            calibration = replace(calibration, imatrix=locate_imatrix(calibration.imatrix, access, progress))
        plan = plan_for(model, goal, form, calibration, output.file_format)
        path = output.place(output.name or opened.name, plan.recipe.name)
        measured = None
        if goal.measures:
            here = replace(output, path=path)
            measuring = measured_plan(model, goal, here, form, calibration, compute, progress)
            measured = stack.enter_context(measuring)
            plan = measured.plan
        opened.fetch_on_demand(access.scratch, journal_folder(path) / "shards")
        asked, calibration = calibration, calibration_for(plan, goal, calibration)
        for line in decisions(opened, goal, plan, asked, calibration):
            _log.debug(line)
        inputs = _inputs(model, calibration, evaluation)
        metadata = _metadata(opened, plan, output, progress) | _importance_metadata(inputs, calibration, output)
        kept = measured.measured if measured else None
        work = _Work(model, plan, path, output, metadata, calibration, inputs, compute, earlier, kept)
        done = _carry_out(work, _identity(work, evaluation), bool(form.mtp), progress)
        parity = done.parity
        if parity and evaluation:
            parity = replace(parity, tokenization=_tokenization(work, evaluation))
    provenance = opened.provenance
    spent = done.earlier + (measured.earlier if measured else Spent()) + Spent.since(started)
    origin, details = provenance.get("repository", model.path.as_posix()), Details(plan, done.findings)
    made = Conversion.of(path, done.files, details, origin, spent, parity)
    return replace(
        made,
        problems=(*made.problems, *done.problems, *_problems(work, parity)),
        revision=provenance.get("revision"),
        imatrix=InputFile.of(calibration.imatrix) if calibration.imatrix else None,
        texts=_texts(calibration, evaluation),
        resumed=done.resumed or (measured is not None and measured.resumed),
        reused=done.reused,
    )


def _texts(calibration: Calibration, evaluation: Evaluation | None) -> dict[str, InputFile]:
    """What ran through the model."""
    texts = {"calibration": calibration.text if calibration.runs else None}
    if evaluation:
        texts["evaluation"] = evaluation.text
        texts |= {f"evaluation {name}": file for name, file in evaluation.categories.items()}
    return {use: InputFile.of(text) for use, text in texts.items() if text is not None}


def _tokenization(work: _Work, evaluation: Evaluation) -> Tokenization | None:
    """How the file's tokenizer does on the evaluation text; an ONNX folder has the source's own."""
    if (written := work.written_tokenizer) is None:
        return None
    return compare_tokenizers(work.model.tokenizer, written, evaluation.read())


def _names(evaluation: Evaluation) -> str:
    return " + ".join(file.name for file in evaluation.texts.values())


def _problems(work: _Work, parity: Parity | None) -> list[str]:
    """What the result does not do as its source does, apart from what its plan says."""
    inputs, problems = work.inputs, [] if parity is None else [*parity.problems]
    if inputs.tokens:
        beyond = beyond_context(inputs.context, work.model.context_length)
        problems += [line for line in beyond if line not in problems]
    if isinstance(inputs.importance, MeasuredImportance):
        problems += missing_entries(inputs.importance.matrix, work.plan)
    if work.output.file_format == "gguf":
        problems += tokenizer_problems(work.model.tokenizer, work.metadata, work.written_tokenizer)
    elif parity is not None and work.output.rounded_activations == "int8":
        problems.append(_ROUNDED_ACTIVATIONS)
    return problems


def _open(source: str | Path | Model, access: HubAccess, goal: Goal, progress: Progress) -> Source:
    # Measuring reads the model more than once, so it has to be here as a whole.
    if access.scratch is not None and goal.measures:
        raise BadInput("--scratch drops shards, and --size and --bpw measure all of them first: leave it out")
    opened = open_source(source, access, access.keep_source or goal.measures, progress)
    if opened.model.metadata:
        raise BadInput(f"{opened.model.path} is a GGUF file, expected a checkpoint folder")
    if access.scratch is not None and opened.checkpoint is None:
        raise BadInput(f"--scratch limits what is fetched, and all of {opened.model.path} is here: leave it out")
    return opened


@dataclass(frozen=True)
class _Work:
    """All that is decided before the first byte is written."""

    model: Model
    plan: Plan
    path: Path
    output: Output
    metadata: dict[str, Any]
    calibration: Calibration
    inputs: PassInputs
    compute: Compute
    earlier: EarlierFile | None = None
    measured: Measured | None = None

    @cached_property
    def written_tokenizer(self) -> Tokenizer | None:
        """What the result makes of a text, None where that is not known."""
        return written_tokenizer(self.metadata) if self.output.file_format == "gguf" else self.model.tokenizer


@dataclass(frozen=True)
class _Done:
    """Files, the first of which is the model; how they compare, what was found of layers, what they could not hold;
    whether runs went before, and what these took; what was taken from an earlier file."""

    files: list[Path]
    parity: Parity | None
    findings: Findings
    problems: list[str]
    resumed: bool
    earlier: Spent
    reused: Reused | None


def _metadata(source: Source, plan: Plan, output: Output, progress: Progress) -> dict[str, Any]:
    """The keys of a GGUF file; of an ONNX folder, which has none, only where the model came from."""
    provenance = output.provenance or source.provenance
    if output.file_format == "onnx":
        return {**source_metadata(provenance)}
    return gguf_metadata(source.model, plan, output.name or source.name, output.pre, provenance, progress)


def _importance_metadata(inputs: PassInputs, calibration: Calibration, output: Output) -> dict[str, Any]:
    """What a GGUF file says of how its columns were weighed, in llama-quantize's words."""
    if output.file_format == "onnx":
        return {}
    if isinstance(inputs.importance, MeasuredImportance):
        return imatrix_metadata(inputs.importance.matrix)
    if inputs.calibration is None or calibration.text is None:
        return {}
    return {
        "quantize.imatrix.dataset": Path(calibration.text).name,
        "quantize.imatrix.chunks_count": len(inputs.calibration),
    }


def _inputs(model: Model, calibration: Calibration, evaluation: Evaluation | None) -> PassInputs:
    """What will run through the model."""
    imatrix = read_imatrix(Path(calibration.imatrix)).fitted_to(model) if calibration.imatrix else None
    texts = evaluation.tokens_by_text(model.tokenizer) if evaluation else {}
    return PassInputs(
        calibration.tokens(model.tokenizer) if calibration.runs else None,
        torch.cat([*texts.values()]) if texts else None,
        {name: len(ids) for name, ids in texts.items()},
        importance=MeasuredImportance(imatrix) if imatrix else None,
        min_expert_tokens=calibration.min_expert_tokens,
        error_feedback=bool(calibration.error_feedback),
    )


def _identity(work: _Work, evaluation: Evaluation | None) -> dict[str, str]:
    """Everything that decides the bytes of the output."""
    calibration, inputs, output = work.calibration, work.inputs, work.output
    others = {
        "importance matrix": file_identity(Path(calibration.imatrix)) if calibration.imatrix else "none",
        "calibration": text_identity(calibration.text, inputs.calibration),
        "evaluation": text_identity(_names(evaluation) if evaluation else None, inputs.evaluation),
        "compute dtype": work.compute.dtype,
        "error feedback": "yes" if inputs.error_feedback else "no",
    }
    rounded = output.rounded_activations
    return fingerprint(work.model, work.plan, work.metadata, others, output.split_max_bytes, rounded)


def _carry_out(work: _Work, identity: dict[str, str], draft: bool, progress: Progress) -> _Done:
    """Write the files and compare them with their source."""
    model, plan, inputs = work.model, work.plan, work.inputs
    copies = RUNNING if inputs.evaluation is None else QUANTIZING
    folder, feedback = work.path.parent, inputs.error_feedback
    room = workspace(work.compute, plan.graph, inputs.tokens, inputs.context, folder, copies, feedback)
    together = f", {room.experts_at_once} experts at a time" if feedback and room.experts_at_once > 1 else ""
    identity = identity | {"device": room.device.type + together}
    made_from = _made_from(work, identity)
    reuse = None
    if work.earlier:
        require_free(work.path, work.output.overwrite)
        reuse = Reuse(work.earlier, plan, made_from, progress)
        inputs = reuse.narrowed(inputs, plan, work.calibration.save_to is None)
        if inputs.calibrated_layers is not None:  # what states hold depends on it
            identity["layers that calibrate"] = str(inputs.calibrated_layers)
    with room, Journal(work.path, identity, work.output.overwrite, progress) as journal, ExitStack() as stack:
        resumed = journal.continues
        check_disk(work.path, plan, model, inputs, work.compute.memory, journal, progress)
        imatrix = _imatrix_writer(work)
        if imatrix:
            inputs = replace(inputs, imatrix=stack.enter_context(imatrix))
        with _writer(work, journal) as writer:
            reused = reuse.take_over(writer) if reuse else None
            if inputs.evaluation is None:
                fetch_only_needed(model, plan, writer, inputs)
            if resumed:
                note_resumption(writer.bytes_there, plan, model, progress)
            passed = run_pass(model, plan, writer, inputs, work.compute, journal, room, progress)
            if reuse:
                reuse.add_findings(passed.findings, writer.problems)
        if work.output.file_format == "gguf":
            made = fingerprints_of(plan, made_from, writer, passed.findings, work.measured)
            keep_fingerprints(made, work.path, progress)
        files = [*writer.paths]
        if draft and model.graph.draft:
            files.append(_write_draft(work, journal, room, progress))
    return _Done(files, passed.parity, passed.findings, writer.problems, resumed, journal.earlier, reused)


def _made_from(work: _Work, identity: Mapping[str, str]) -> MadeFrom:
    """What decides the bytes of each tensor, apart from the tensor itself."""
    inputs = work.inputs
    facts = importance_facts(identity, inputs.calibration is not None, inputs.importance is not None)
    if inputs.calibration is not None:
        tokenizer = work.model.tokenizer
        facts["first token"] = str(tokenizer.bos if tokenizer.add_bos else None)
    return MadeFrom(source_identity(work.model, work.metadata), facts, code_digest())


def _imatrix_writer(work: _Work) -> ImatrixWriter | None:
    calibration, tokens = work.calibration, work.inputs.calibration
    if calibration.save_to is None or calibration.text is None or tokens is None:
        return None
    origin = Origin.of(Path(calibration.text), tokens, source_in(work.metadata))
    return ImatrixWriter(Path(calibration.save_to), origin, work.output.overwrite)


def _writer(work: _Work, journal: Journal) -> Writer:
    plan, output = work.plan, work.output
    if isinstance(plan, OnnxPlan):
        verify = work.inputs.evaluation is not None
        activations = output.rounded_activations or "int8"
        return open_onnx_writer(work.model, plan, work.path, activations, output.overwrite, verify, journal)
    return GGUFWriter(work.path, work.metadata, plan.stored, output.split_max_bytes, output.overwrite, journal)


def _write_draft(work: _Work, journal: Journal, room: Workspace, progress: Progress) -> Path:
    """Multi-token prediction that is a draft of its own goes to a second file."""
    model = work.model
    assert model.graph.draft and model.architecture.draft_metadata
    plan = plan_tensors(model.graph.draft, work.plan.recipe)
    metadata = work.metadata | dict(model.architecture.draft_metadata(model.graph))
    path = work.path.with_name(f"{work.path.stem}-mtp.gguf")
    with GGUFWriter(path, metadata, plan.stored, None, work.output.overwrite, journal) as writer:
        run_pass(model, plan, writer, compute=work.compute, workspace=room, progress=progress)
    return path
