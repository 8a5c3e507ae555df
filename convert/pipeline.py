"""From a checkpoint to a quantized file, one expert at a time, and the proof that it is what it should be."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch

from ..errors import BadInput
from ..progress import NoProgress, Progress
from ..quant.planning.plan import Form, Plan
from ..runner.measure.evaluate import Parity
from ..runner.measure.tokenization import Tokenization, compare_tokenizers
from ..runner.settings import Compute, Evaluation
from ..runner.texts import beyond_context
from ..sources.hub.access import HubAccess
from ..sources.imatrix import read_imatrix
from ..sources.locate import Source, locate_imatrix, open_source
from ..sources.model import Model
from .conversion import Conversion, Details, InputFile
from .decisions import decisions
from .encode import MeasuredImportance, missing_entries
from .gguf.metadata import gguf_metadata, imatrix_metadata, source_metadata
from .gguf.tokenizer import tokenizer_problems
from .onepass import PassInputs
from .plans.choose import calibration_for, calibration_of_all, plan_for
from .plans.measured import measured_plan
from .resume.journal import journal_folder
from .resume.records import Spent
from .reuse import EarlierFile
from .settings import VERIFICATION, Calibration, Goal, Output, require_one_pass
from .work import MadeFile, PlannedFile, Work, carry_out

Goals = list[str] | list[Goal] | list[str | Goal] | tuple[str | Goal, ...]
"""Several, each a recipe's name or more than that."""

_log = logging.getLogger(__name__)
_ROUNDED_ACTIVATIONS = (
    "compared as if activations stayed in float32; ONNX Runtime rounds them to 8 bits: `moecast parity` runs it"
)


@overload
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
) -> Conversion: ...


@overload
def convert(
    source: str | Path | Model,
    output: str | Path | Output,
    goal: Goals,
    *,
    form: Form = Form(),
    calibration: Calibration = Calibration(),
    evaluation: Evaluation | None = VERIFICATION,
    compute: Compute = Compute(),
    access: HubAccess = HubAccess(),
    progress: Progress | None = None,
) -> tuple[Conversion, ...]: ...


def convert(
    source: str | Path | Model,
    output: str | Path | Output = ".",
    goal: str | Goal | Goals | None = None,
    *,
    form: Form = Form(),
    calibration: Calibration = Calibration(),
    evaluation: Evaluation | None = VERIFICATION,
    compute: Compute = Compute(),
    access: HubAccess = HubAccess(),
    progress: Progress | None = None,
) -> Conversion | tuple[Conversion, ...]:
    """Convert a checkpoint to GGUF or ONNX: all that `moecast convert` does.

    Args:
        source: checkpoint folder, Hub id, hf:// or https:// address, or an open model, which is closed in the end.
        output: a path, or where, what and how to write.
        goal: a recipe name such as Q4_K_M, the default for GGUF, or what else the types of weights follow from. Several
            make a file each, in one folder and one pass over the source; their conversions come in the same order.
        evaluation: on what to compare the result with the source; None for no comparison.

    A journal beside the output records what is done: stopped by whatever means, the same call continues.

    Raises BadInput for anything wrong with the input or an existing output; then nothing is left under the output's
    name. Raises Interrupted for a full disk or a lost connection.
    """
    started = time.monotonic()
    output = output if isinstance(output, Output) else Output(output)
    given, alone = ([goal], True) if goal is None or isinstance(goal, str | Goal) else ([*goal], False)
    goals = [each if isinstance(each, Goal) else Goal(each) for each in given]
    progress = progress or NoProgress()
    require_one_pass(goals, output.reuse)
    calibration = calibration_of_all(goals, calibration)
    earlier = EarlierFile(Path(output.reuse)) if output.reuse else None
    with ExitStack() as stack:
        opened = _open(source, access, goals[0].measures, progress)
        model = opened.model
        stack.callback(model.close)
        if calibration.imatrix:
            calibration = replace(calibration, imatrix=locate_imatrix(calibration.imatrix, access, progress))
        plans = [plan_for(model, each, form, calibration, output.file_format) for each in goals]
        name = output.name or opened.name
        paths = output.places(name, [plan.recipe.name for plan in plans])
        path, measured = paths[0] if len(paths) == 1 else paths[0].with_name(name), None
        if goals[0].measures:
            here = replace(output, path=path)
            measuring = measured_plan(model, goals[0], here, form, calibration, compute, progress)
            measured = stack.enter_context(measuring)
            plans = [measured.plan]
        opened.fetch_on_demand(access.scratch, journal_folder(path) / "shards")
        calibrations = [calibration_for(plan, each, calibration) for plan, each in zip(plans, goals, strict=True)]
        for each, plan, own in zip(goals, plans, calibrations, strict=True):
            for line in decisions(opened, each, plan, calibration, own):
                _log.debug(line)
        used = next((own for own in calibrations if own.weighs), calibrations[0])
        inputs = _inputs(model, used, evaluation)
        described = zip(paths, plans, _metadata(opened, plans, output, progress), calibrations, strict=True)
        files = [
            PlannedFile(where, plan, keys | _importance_metadata(inputs, own, output), own)
            for where, plan, keys, own in described
        ]
        kept = measured.measured if measured else None
        work = Work(model, files, path, output, used, inputs, compute, earlier, kept)
        done = carry_out(work, evaluation, bool(form.mtp), progress)
        spent = done.earlier + (measured.earlier if measured else Spent()) + Spent.since(started)
        resumed = done.resumed or (measured is not None and measured.resumed)
        made = [
            replace(_conversion(work, file, found, evaluation, opened.provenance, spent), resumed=resumed)
            for file, found in zip(files, done.files, strict=True)
        ]
    return made[0] if alone else tuple(made)


def _conversion(
    work: Work,
    file: PlannedFile,
    made: MadeFile,
    evaluation: Evaluation | None,
    provenance: Mapping[str, str],
    spent: Spent,
) -> Conversion:
    """What was made of one of the files."""
    parity, calibration = made.passed.parity, file.calibration
    if parity and evaluation:
        parity = replace(parity, tokenization=_tokenization(work, file, evaluation))
    origin = provenance.get("repository", work.model.path.as_posix())
    conversion = Conversion.of(file.path, made.paths, Details(file.plan, made.passed.findings), origin, spent, parity)
    return replace(
        conversion,
        problems=(*conversion.problems, *made.problems, *_problems(work, file, parity)),
        revision=provenance.get("revision"),
        imatrix=InputFile.of(calibration.imatrix) if calibration.imatrix else None,
        texts=_texts(calibration, evaluation),
        draft=made.draft,
        reused=made.reused,
    )


def _texts(calibration: Calibration, evaluation: Evaluation | None) -> dict[str, InputFile]:
    """What ran through the model."""
    texts = {"calibration": calibration.text if calibration.runs else None}
    if evaluation:
        texts["evaluation"] = evaluation.text
        texts |= {f"evaluation {name}": file for name, file in evaluation.categories.items()}
    return {use: InputFile.of(text) for use, text in texts.items() if text is not None}


def _tokenization(work: Work, file: PlannedFile, evaluation: Evaluation) -> Tokenization | None:
    """How the file's tokenizer does on the evaluation text; an ONNX folder has the source's own."""
    if (written := work.written_tokenizer(file)) is None:
        return None
    return compare_tokenizers(work.model.tokenizer, written, evaluation.read())


def _problems(work: Work, file: PlannedFile, parity: Parity | None) -> list[str]:
    """What the result does not do as its source does, apart from what its plan says."""
    inputs, problems = work.inputs, [] if parity is None else [*parity.problems]
    if file.calibration.runs or parity is not None:
        beyond = beyond_context(inputs.context, work.model.context_length)
        problems += [line for line in beyond if line not in problems]
    if isinstance(inputs.importance, MeasuredImportance):
        problems += missing_entries(inputs.importance.matrix, file.plan)
    if work.output.file_format == "gguf":
        problems += tokenizer_problems(work.model.tokenizer, file.metadata, work.written_tokenizer(file))
    elif parity is not None and work.output.rounded_activations == "int8":
        problems.append(_ROUNDED_ACTIVATIONS)
    return problems


def _open(source: str | Path | Model, access: HubAccess, measures: bool, progress: Progress) -> Source:
    # Measuring reads the model more than once, so it has to be here as a whole.
    if access.scratch is not None and measures:
        raise BadInput("--scratch drops shards, and --size and --bpw measure all of them first: leave it out")
    opened = open_source(source, access, access.keep_source or measures, progress)
    if opened.model.metadata:
        raise BadInput(f"{opened.model.path} is a GGUF file, expected a checkpoint folder")
    if access.scratch is not None and opened.checkpoint is None:
        raise BadInput(f"--scratch limits what is fetched, and all of {opened.model.path} is here: leave it out")
    return opened


def _metadata(source: Source, plans: Sequence[Plan], output: Output, progress: Progress) -> Iterator[dict[str, Any]]:
    """The keys of each GGUF file; of ONNX folders, which have none, only where the model came from."""
    provenance, name = output.provenance or source.provenance, output.name or source.name
    for number, plan in enumerate(plans):
        said = NoProgress() if number else progress  # what the source's card and tokenizer lack is noted once
        gguf = output.file_format == "gguf"
        yield (
            gguf_metadata(source.model, plan, name, output.pre, provenance, said)
            if gguf
            else {**source_metadata(provenance)}
        )


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
