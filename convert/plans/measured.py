"""The plan under a budget that a model's own measurements lead to, kept until the file that it is for is complete."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ...progress import NoProgress, Progress
from ...quant.planning.plan import Form, Plan
from ...runner.passes import Measuring, packed
from ...runner.placement import Need, place
from ...runner.settings import Compute
from ...runner.texts import CALIBRATION_TEXT
from ...sources.imatrix import read_imatrix
from ...sources.model import Model
from ..encode import MeasuredImportance
from ..resume.fingerprint import differences, file_identity, measurement_fingerprint, text_identity
from ..resume.journal import Journal, require_free
from ..resume.records import Spent
from ..resume.sidecar import Measured, read_fingerprints
from ..settings import Calibration, Goal, Output
from .allocate import DAMAGE, HELD_OUT_CHUNKS, choose_measured_plan, probe_chunks, split_tokens
from .choose import budget_of, with_error_feedback


def plan_record(path: Path) -> Path:
    """The output as whose journal it is kept what was measured for `path`."""
    return path.with_name(f"{path.name}.plan")


@dataclass(frozen=True)
class MeasuredPlan:
    """A plan that measurements led to, these, what earlier runs took to measure, and whether there were any."""

    plan: Plan
    measured: Measured
    earlier: Spent
    resumed: bool


@contextmanager
def measured_plan(
    model: Model,
    goal: Goal,
    output: Output,
    form: Form = Form(),
    calibration: Calibration = Calibration(),
    compute: Compute = Compute(),
    progress: Progress | None = None,
) -> Iterator[MeasuredPlan]:
    """The best plan for a goal that is a budget; inside the context, make the output, whose path is final, of it.

    Probes and comparisons take parts of the calibration text, of the bundled one where columns are not weighed by any.
    What was measured is kept beside the output until the context ends well: stopped by whatever means, here or while
    converting, the same call goes on; so it does after what `convert` refuses. What single weights do was measured
    already where it is that of the file to reuse, whatever its budget. Raises BadInput as `choose_measured_plan` and
    `convert` do.
    """
    path, progress = Path(output.path), progress or NoProgress()
    budget, calibration = budget_of(model, goal), with_error_feedback(calibration, goal)
    text, tokens = calibration.text or CALIBRATION_TEXT, calibration.tokens(model.tokenizer)
    probes, held_out = split_tokens(tokens, probe_chunks(model.graph), HELD_OUT_CHUNKS)
    imatrix = Path(calibration.imatrix) if calibration.imatrix else None
    facts = measurement_fingerprint(
        model,
        {
            "importance matrix": file_identity(imatrix) if imatrix else "none",
            "text": text_identity(text, tokens),
            "calibration": "yes" if calibration.runs else "no",
            "compute dtype": compute.dtype,
            "error feedback": "yes" if calibration.error_feedback else "no",
            "padding and prediction": f"{form.padding}, {form.mtp}",
        },
    )
    quant = {"quant": f"{budget.name} ({budget.bytes} bytes, {budget.bytes_per_token} a token)"}
    with Journal(plan_record(path), facts | quant, output.overwrite, progress, keep_on_bad_input=True) as journal:
        require_free(path, output.overwrite)
        measuring = Measuring(
            model,
            tokens if calibration.runs else None,
            MeasuredImportance(read_imatrix(imatrix).fitted_to(model)) if imatrix else None,
            progress,
            compute.torch_dtype,
            bool(calibration.error_feedback),
        )
        resumed = journal.continues
        facts["device"] = place(compute.device, compute.vram, Need(0)).device.type
        if output.reuse and not journal.holds(DAMAGE):
            _take_over(Path(output.reuse), facts, journal, progress)
        found = choose_measured_plan(measuring, budget, probes, held_out, form, compute, journal)
        yield MeasuredPlan(found.plan, Measured(facts, found.damage), journal.earlier, resumed)


def _take_over(earlier: Path, facts: Mapping[str, str], journal: Journal, progress: Progress) -> None:
    """Keep what single weights do as measured, where it was measured of the same."""
    measured = read_fingerprints(earlier).measured
    if measured and not differences(measured.facts, facts):
        journal.save(DAMAGE, [packed(asdict(measured.damage))])
        progress.note(f"What single weights do was measured for {earlier}: only whole plans are compared")
