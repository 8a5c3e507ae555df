"""The plan under a budget that a model's own measurements lead to, kept until the file that it is for is complete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ...documents import exists
from ...errors import OutputExists
from ...progress import NoProgress, Progress
from ...runner.measure.evaluate import CALIBRATION_TEXT, DEFAULT_CONTEXT, chunk_tokens, dtype_name
from ...runner.passes import Measuring
from ...sources.imatrix import read_imatrix
from ...sources.model import Model
from ..encode import MeasuredImportance
from ..pipeline import check_error_feedback
from ..resume.fingerprint import file_identity, measurement_fingerprint, text_identity
from ..resume.journal import Journal, journal_folder
from .allocate import HELD_OUT_CHUNKS, Allocation, choose_measured_plan, probe_chunks, split_tokens
from .choose import Budget


@contextmanager
def measured_plan(
    model: Model,
    budget: Budget,
    path: Path,
    *,
    calibration: Path | None = CALIBRATION_TEXT,
    imatrix: Path | None = None,
    context: int = DEFAULT_CONTEXT,
    padding: bool = True,
    mtp: bool | None = None,
    overwrite: bool = False,
    memory: int | None = None,
    compute_dtype: torch.dtype = torch.float32,
    error_feedback: bool = False,
    progress: Progress | None = None,
) -> Iterator[Allocation]:
    """The best plan within a budget; inside the context, make `path` of it. Other arguments as for `convert`.

    Probes and comparisons take parts of the calibration text, of the bundled one where columns are not weighed by any.
    What was measured is kept beside `path` until the context ends well: stopped by whatever means, here or while
    converting, the same call goes on; so it does after what `convert` refuses. Raises BadInput as
    `choose_measured_plan` and `convert` do.
    """
    check_error_feedback(error_feedback, calibration, imatrix)
    text = calibration or CALIBRATION_TEXT
    tokens = chunk_tokens(model.tokenizer, text, context, None)
    probes, held_out = split_tokens(tokens, probe_chunks(model.graph), HELD_OUT_CHUNKS)
    identity = measurement_fingerprint(
        model,
        {
            "quant": f"{budget.name} ({budget.bytes} bytes, {budget.bytes_per_token} a token)",
            "importance matrix": file_identity(imatrix) if imatrix else "none",
            "text": text_identity(text, tokens),
            "calibration": "yes" if calibration and not imatrix else "no",
            "the type of products": dtype_name(compute_dtype),
            "error feedback": "yes" if error_feedback else "no",
            "padding and prediction": f"{padding}, {mtp}",
        },
    )
    with Journal(path.with_name(f"{path.name}.plan"), identity, overwrite, keep_on_bad_input=True) as journal:
        if exists(path) and not (overwrite or journal_folder(path).exists()):
            raise OutputExists(path)
        measuring = Measuring(
            model,
            tokens if calibration and not imatrix else None,
            MeasuredImportance(read_imatrix(imatrix)) if imatrix else None,
            progress or NoProgress(),
            compute_dtype,
            error_feedback,
        )
        yield choose_measured_plan(
            measuring, budget, probes, held_out, padding=padding, mtp=mtp, memory=memory, journal=journal
        )
