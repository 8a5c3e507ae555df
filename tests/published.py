"""A folder as `moecast convert` leaves it, with reports whose figures are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conversions import convert

SHA256 = "16b328275fb2fbfdcd1a9931602a97739cb63e2728c4c298bdeab239239d8f05"
COMMAND = "moecast convert owner/tiny --quant NAME -f text.txt"


def parity(**changes: Any) -> dict[str, Any]:
    values = {
        "perplexity_reference": 20.0,
        "perplexity_candidate": 21.0,
        "mean_kld": 0.0625,
        "mean_kld_error": 0.00125,
        "kld_999": 1.5,
        "kld_maximum": 2.5,
        "mean_delta_p": -0.001,
        "rms_delta_p": 0.02,
        "top1_agreement": 0.875,
        "tokens": 1020,
        "context": 512,
        "chunks": 4,
        "compute_dtype": "float32",
        "context_length": 2048,
        "problems": ["token ids differ"],
    }
    return values | changes


def write_report(model: Path, **changes: Any) -> None:
    """The report beside a model's file, or in place of an earlier one; None takes a value away."""
    values = {
        "version": 1,
        "kind": "conversion",
        "title": model.name,
        "provenance": {
            "source": "owner/tiny",
            "revision": None,
            "texts": {"evaluation text": ["text.txt", SHA256]},
            "versions": {"moecast": "0.1.0", "torch": "2.13.0"},
            "created": "2026-11-28T00:34:52+00:00",
            "command": COMMAND.replace("NAME", model.stem.rpartition("-")[2]),
        },
        "bytes": model.stat().st_size,
        "recipe": model.stem.rpartition("-")[2],
        "parity": parity(),
        "experts": [{"layer": 0, "tokens": [9, 9], "fewest": 9, "unseen": []}],
        "problems": ["rows of 96 are stored as Q5_0"],
    } | changes
    model.with_name(f"{model.stem}.report.json").write_text(json.dumps(values), encoding="utf-8")
    model.with_name(f"{model.stem}.report.html").write_text(f"<!DOCTYPE html><title>{model.stem}</title>")


def write_folder(checkpoint: Path, folder: Path, *recipes: str) -> list[Path]:
    """Convert a checkpoint by recipes, without measuring anything."""
    models = []
    for recipe in recipes:
        made = convert(checkpoint, folder / f"tiny-{recipe}.gguf", recipe, calibration=None, verify=False)
        models.append(made.files[0])
        write_report(made.files[0])
    return models
