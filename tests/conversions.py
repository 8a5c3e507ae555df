"""Conversions in one line: the settings that tests vary, by short names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import moecast.convert.encode
import pytest
from moecast.convert.conversion import Conversion
from moecast.convert.pipeline import convert as convert_checkpoint
from moecast.convert.resume import journal
from moecast.convert.settings import Calibration, Goal, Output
from moecast.quant.planning.plan import Form, Plan
from moecast.runner.settings import Compute, Evaluation
from moecast.runner.texts import CALIBRATION_TEXT, EVALUATION_TEXT
from moecast.sources.model import Model


def convert(
    source: str | Path | Model,
    output: str | Path = ".",
    quant: str | Plan | Goal | None = None,
    *,
    calibration: str | Path | None = CALIBRATION_TEXT,
    verify: bool = True,
    file: str | Path = EVALUATION_TEXT,
    context: int = 512,
    chunks: int | None = 16,
    calibration_chunks: int | None = None,
    padding: bool | None = None,
    mtp: bool | None = None,
    compute_dtype: str = "float32",
    threads: int | None = None,
    memory: int | None = None,
    device: str = "auto",
    progress: Any = None,
    **others: Any,
) -> Conversion:
    """With one context for both texts; other names are those of `Calibration` and `Output`."""
    calibrating = {name: others.pop(name) for name in [*others] if name in Calibration.__dataclass_fields__}
    return convert_checkpoint(
        source,
        Output(output, **others),
        Goal(plan=quant) if isinstance(quant, Plan) else quant,
        form=Form(padding, mtp),
        calibration=Calibration(calibration, context, calibration_chunks, **calibrating),
        evaluation=Evaluation(file, context, chunks) if verify else None,
        compute=Compute(compute_dtype, threads, memory, device),
        progress=progress,
    )


@contextmanager
def stopped_after(pieces: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Conversions inside are stopped, as by Ctrl-C, when they have quantized so many pieces and recorded each."""
    with interrupting_after(pieces, monkeypatch), pytest.raises(KeyboardInterrupt):
        yield


@contextmanager
def interrupting_after(pieces: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same, for who runs them to hear of: commands end with a code of their own."""
    quantize, left = moecast.convert.encode.quantize_weight, iter(range(pieces))

    def until_stopped(*arguments: object) -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return quantize(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(journal, "BATCH_SECONDS", 0.0)
        patched.setattr(moecast.convert.encode, "quantize_weight", until_stopped)
        yield
