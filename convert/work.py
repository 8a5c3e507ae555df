"""Carries out what a conversion has decided: journal, room in memory and on disk, writers, the one pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..progress import Progress
from ..quant.planning.onnx_plan import OnnxPlan
from ..quant.planning.plan import Plan, plan_tensors
from ..runner.activations import Workspace
from ..runner.memory import RUNNING, quantizing, working_set, workspace
from ..runner.settings import Compute, Evaluation
from ..sources.imatrix import source_in
from ..sources.model import Model
from ..sources.tokenizer import Tokenizer
from .conversion import Reused
from .gguf.imatrix import ImatrixWriter, Origin
from .gguf.tokenizer import written_tokenizer
from .gguf.writer import GGUFWriter
from .onepass import FileToWrite, Passed, PassInputs, run_pass
from .onnx.export import open_onnx_writer
from .preflight import check_disk, note_resumption
from .resume.fingerprint import code_digest, file_identity, fingerprint, source_identity, text_identity
from .resume.journal import Journal, journal_folder, require_free
from .resume.records import Spent
from .resume.sidecar import MadeFrom, Measured, importance_facts, keep_fingerprints
from .reuse import EarlierFile, Reuse, fetch_only_needed, fingerprints_of
from .settings import Calibration, Output
from .writer import Writer


@dataclass(frozen=True)
class PlannedFile:
    """A file, or the folder of an ONNX model, that a conversion will make.

    Attributes:
        metadata: the keys of a GGUF file.
        calibration: what weighs its columns.
    """

    path: Path
    plan: Plan
    metadata: dict[str, Any]
    calibration: Calibration


@dataclass(frozen=True)
class Work:
    """All that is decided before the first byte is written.

    Attributes:
        files: what is made, in one pass.
        path: beside which the journal lies: the file, or the name that several have in common.
        calibration: what runs through the model for any of them.
        earlier: what the only file takes its tensors from, where they are the same.
        measured: what its types were chosen by.
    """

    model: Model
    files: Sequence[PlannedFile]
    path: Path
    output: Output
    calibration: Calibration
    inputs: PassInputs
    compute: Compute
    earlier: EarlierFile | None = None
    measured: Measured | None = None

    @cached_property
    def plans(self) -> list[Plan]:
        return [file.plan for file in self.files]

    def written_tokenizer(self, file: PlannedFile) -> Tokenizer | None:
        """What a file makes of a text, None where that is not known."""
        return written_tokenizer(file.metadata) if self.output.file_format == "gguf" else self.model.tokenizer

    def identity(self, evaluation: Evaluation | None) -> dict[str, str]:
        """Everything that decides the bytes of all files."""
        found = [self._identity_of(file, evaluation) for file in self.files]
        merged = {name: [identity[name] for identity in found] for name in found[0]}
        return {name: facts[0] if len({*facts}) == 1 else " + ".join(facts) for name, facts in merged.items()}

    def _identity_of(self, file: PlannedFile, evaluation: Evaluation | None) -> dict[str, str]:
        calibration, inputs, output = file.calibration, self.inputs, self.output
        names = " + ".join(text.name for text in evaluation.texts.values()) if evaluation else None
        others = {
            "importance matrix": file_identity(Path(calibration.imatrix)) if calibration.imatrix else "none",
            "calibration": text_identity(calibration.text, inputs.calibration),
            "evaluation": text_identity(names, inputs.evaluation),
            "compute dtype": self.compute.dtype,
            "error feedback": "yes" if calibration.error_feedback else "no",
        }
        rounded = output.rounded_activations
        return fingerprint(self.model, file.plan, file.metadata, others, output.split_max_bytes, rounded)

    def made_from(self, file: PlannedFile, device: str) -> MadeFrom:
        """What decides the bytes of each tensor of a file, apart from the tensor itself."""
        weighs, inputs = file.calibration.weighs, self.inputs
        calibrated = weighs and inputs.calibration is not None
        identity = self._identity_of(file, None) | {"device": device}
        facts = importance_facts(identity, calibrated, weighs and inputs.importance is not None)
        if calibrated:
            tokenizer = self.model.tokenizer
            facts["first token"] = str(tokenizer.bos if tokenizer.add_bos else None)
        return MadeFrom(source_identity(self.model, file.metadata), facts, code_digest())

    def room(self) -> Workspace:
        """Where it computes, and within which bounds."""
        inputs, files = self.inputs, len(self.files)
        forms = {tuple(tensor.weight.shape for tensor in plan.tensors) for plan in self.plans}
        copies = RUNNING if inputs.evaluation is None else quantizing(files, len(forms))
        graph = max((plan.graph for plan in self.plans), key=lambda graph: working_set(graph, inputs.context, copies))
        tokens, folder, feedback = inputs.tokens(files), self.path.parent, inputs.error_feedback
        return workspace(self.compute, graph, tokens, inputs.context, folder, copies, feedback, files)


@dataclass(frozen=True)
class MadeFile:
    """The paths of a file, the first of which is the model; what its pass found, and what it could not hold; which of
    the paths is a draft; what was taken from an earlier file."""

    paths: Sequence[Path]
    passed: Passed
    problems: Sequence[str]
    draft: Path | None
    reused: Reused | None


@dataclass(frozen=True)
class Done:
    """What came of the work; whether runs went before, and what these took."""

    files: Sequence[MadeFile]
    resumed: bool
    earlier: Spent


def carry_out(work: Work, evaluation: Evaluation | None, draft: bool, progress: Progress) -> Done:
    """Write the files and compare them with their source.

    draft: multi-token prediction that is a draft of its own is written too.
    """
    model, inputs, room = work.model, work.inputs, work.room()
    device = room.device.type
    if inputs.error_feedback and room.experts_at_once > 1:
        device += f", {room.experts_at_once} experts at a time"
    identity = work.identity(evaluation) | {"device": device}
    sources = [work.made_from(file, device) for file in work.files]
    reuse = _reuse(work, sources[0], progress)
    if reuse:
        inputs = reuse.narrowed(inputs, work.plans[0], work.calibration.save_to is None)
    if inputs.calibrated_layers is not None:  # what states hold depends on it
        identity["layers that calibrate"] = str(inputs.calibrated_layers)
    _refuse_unfinished(work, identity, progress)
    with room, Journal(work.path, identity, work.output.overwrite, progress) as journal, ExitStack() as stack:
        resumed = journal.continues
        check_disk(work.path, work.plans, model, inputs, work.compute.memory, journal, progress)
        imatrix = _imatrix_writer(work)
        if imatrix:
            inputs = replace(inputs, imatrix=stack.enter_context(imatrix))
        with ExitStack() as writing:
            writers = [writing.enter_context(_writer(work, file, journal)) for file in work.files]
            reused = reuse.take_over(writers[0]) if reuse else None
            if resumed:
                there, size = sum(writer.bytes_there for writer in writers), sum(plan.bytes for plan in work.plans)
                note_resumption(there, size, model, progress)
            passed = _pass(work, inputs, writers, journal, room, progress)
            if reuse:
                reuse.add_findings(passed[0].findings, writers[0].problems)
        if work.output.file_format == "gguf":
            for file, writer, found, source in zip(work.files, writers, passed, sources, strict=True):
                made_of = fingerprints_of(file.plan, source, writer, found.findings, work.measured)
                keep_fingerprints(made_of, file.path, progress)
        drafts: Sequence[Path | None] = [None] * len(writers)
        if draft and model.graph.draft:
            drafts = _write_drafts(work, journal, room, progress)
    made = [
        MadeFile([*writer.paths, *([beside] if beside else [])], found, writer.problems, beside, reused)
        for writer, beside, found in zip(writers, drafts, passed, strict=True)
    ]
    return Done(made, resumed, journal.earlier)


def _reuse(work: Work, made_from: MadeFrom, progress: Progress) -> Reuse | None:
    """What the only file takes from an earlier one."""
    if not work.earlier:
        return None
    require_free(work.path, work.output.overwrite)
    return Reuse(work.earlier, work.plans[0], made_from, progress)


def _pass(
    work: Work, inputs: PassInputs, writers: Sequence[Writer], journal: Journal, room: Workspace, progress: Progress
) -> Sequence[Passed]:
    """Make what is missing of all files."""
    if inputs.evaluation is None:
        fetch_only_needed(work.model, [*zip(work.plans, writers, strict=True)], inputs)
    given = zip(work.files, writers, strict=True)
    files = [FileToWrite(file.plan, writer, file.calibration.weighs) for file, writer in given]
    return run_pass(work.model, files, inputs, work.compute, journal, room, progress)


def _refuse_unfinished(work: Work, identity: dict[str, str], progress: Progress) -> None:
    """Several files have a journal of their own: raises BadInput where one of them is at work in another conversion."""
    for file in work.files:
        if file.path != work.path and journal_folder(file.path).exists():
            with Journal(file.path, identity, work.output.overwrite, progress):
                pass  # it is nobody's, or to be overwritten: it goes


def _imatrix_writer(work: Work) -> ImatrixWriter | None:
    calibration, tokens = work.calibration, work.inputs.calibration
    if calibration.save_to is None or calibration.text is None or tokens is None:
        return None
    origin = Origin.of(Path(calibration.text), tokens, source_in(work.files[0].metadata))
    return ImatrixWriter(Path(calibration.save_to), origin, work.output.overwrite)


def _writer(work: Work, file: PlannedFile, journal: Journal) -> Writer:
    plan, output = file.plan, work.output
    if isinstance(plan, OnnxPlan):
        verify = work.inputs.evaluation is not None
        activations = output.rounded_activations or "int8"
        return open_onnx_writer(work.model, plan, file.path, activations, output.overwrite, verify, journal)
    return GGUFWriter(file.path, file.metadata, plan.stored, output.split_max_bytes, output.overwrite, journal)


def _write_drafts(work: Work, journal: Journal, room: Workspace, progress: Progress) -> Sequence[Path | None]:
    """Multi-token prediction that is a draft of its own goes to a second file."""
    model, overwrite = work.model, work.output.overwrite
    assert model.graph.draft and model.architecture.draft_metadata
    own, replaced = dict(model.architecture.draft_metadata(model.graph)), f"{model.graph.architecture}."
    with ExitStack() as stack:
        files = []
        for file in work.files:
            plan = plan_tensors(model.graph.draft, file.plan.recipe)
            path = file.path.with_name(f"{file.path.stem}-mtp.gguf")
            others = {key: value for key, value in file.metadata.items() if not key.startswith(replaced)}
            writer = GGUFWriter(path, others | own, plan.stored, None, overwrite, journal)
            files.append(FileToWrite(plan, stack.enter_context(writer)))
        run_pass(model, files, compute=work.compute, workspace=room, progress=progress)
    return [file.writer.paths[0] for file in files]
