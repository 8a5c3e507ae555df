"""The plan under a budget that a model's own measurements lead to, kept until the file that it is for is complete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...documents import exists
from ...errors import OutputExists
from ...progress import NoProgress, Progress
from ...quant.planning.plan import Form, Plan
from ...runner.passes import Measuring
from ...runner.settings import Compute
from ...runner.texts import CALIBRATION_TEXT
from ...sources.imatrix import read_imatrix
from ...sources.model import Model
from ..encode import MeasuredImportance
from ..resume.fingerprint import file_identity, measurement_fingerprint, text_identity
from ..resume.journal import Journal, journal_folder
from ..resume.records import Spent
from ..settings import Calibration, Goal
from .allocate import HELD_OUT_CHUNKS, choose_measured_plan, probe_chunks, split_tokens
from .choose import budget_of, with_error_feedback


def plan_record(path: Path) -> Path:
    """The output as whose journal it is kept what was measured for `path`."""
    return path.with_name(f"{path.name}.plan")


@dataclass(frozen=True)
class MeasuredPlan:
    """A plan that measurements led to, what earlier runs took to measure, and whether there were any."""

    plan: Plan
    earlier: Spent
    resumed: bool


@contextmanager
def measured_plan(
    model: Model,
    goal: Goal,
    path: Path,
    form: Form = Form(),
    calibration: Calibration = Calibration(),
    compute: Compute = Compute(),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Iterator[MeasuredPlan]:
    """The best plan for a goal that is a budget; inside the context, make `path` of it.

    Probes and comparisons take parts of the calibration text, of the bundled one where columns are not weighed by any.
    What was measured is kept beside `path` until the context ends well: stopped by whatever means, here or while
    converting, the same call goes on; so it does after what `convert` refuses. Raises BadInput as
    `choose_measured_plan` and `convert` do.
    """
    budget, calibration = budget_of(model, goal), with_error_feedback(calibration, goal)
    text, tokens = calibration.text or CALIBRATION_TEXT, calibration.tokens(model.tokenizer)
    probes, held_out = split_tokens(tokens, probe_chunks(model.graph), HELD_OUT_CHUNKS)
    imatrix = Path(calibration.imatrix) if calibration.imatrix else None
    identity = measurement_fingerprint(
        model,
        {
            "quant": f"{budget.name} ({budget.bytes} bytes, {budget.bytes_per_token} a token)",
            "importance matrix": file_identity(imatrix) if imatrix else "none",
            "text": text_identity(text, tokens),
            "calibration": "yes" if calibration.runs else "no",
            "compute dtype": compute.dtype,
            "error feedback": "yes" if calibration.error_feedback else "no",
            "padding and prediction": f"{form.padding}, {form.mtp}",
        },
    )
    with Journal(plan_record(path), identity, overwrite, progress, keep_on_bad_input=True) as journal:
        if exists(path) and not (overwrite or journal_folder(path).exists()):
            raise OutputExists(path)
        measuring = Measuring(
            model,
            tokens if calibration.runs else None,
            MeasuredImportance(read_imatrix(imatrix).fitted_to(model)) if imatrix else None,
            progress or NoProgress(),
            compute.torch_dtype,
            bool(calibration.error_feedback),
        )
        resumed = journal.continues
        found = choose_measured_plan(measuring, budget, probes, held_out, form, compute, journal)
        yield MeasuredPlan(found.plan, journal.earlier, resumed)
