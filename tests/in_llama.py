"""What the tests of every family ask of its files in llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama
from conversions import convert
from forward import runner_logits
from moecast.runner.generate import generate
from moecast.sources.model import open_model
from torch import Tensor

PROMPT = "And it came to pass"


def unquantized(checkpoint: Path, output: Path) -> Path:
    return convert(checkpoint, output, "F32", calibration=None, verify=False).files[0]


def divergence(path: Path, tokens: Tensor, **options: Any) -> float:
    """Mean KL divergence of llama.cpp, with options, on a file from our runner on it; tokens [1, context]."""
    theirs = llama.run_isolated(path, tokens[0].tolist(), **options)
    return llama.mean_divergence(runner_logits(open_model(path), tokens)[0].numpy(), theirs)


def assert_goes_on_alike(checkpoint: Path, output: Path, count: int = 16, **options: Any) -> None:
    """Of a Q8_0 file the runner says the same so many tokens as llama.cpp, the most probable one each time."""
    path = convert(checkpoint, output, "Q8_0", calibration=None, verify=False).files[0]
    with llama.Engine(path, **options) as engine:
        ids = prompted = engine.tokenize(PROMPT, add_special=True)
        for _ in range(count):
            ids = [*ids, int(engine.logits(ids)[-1].argmax())]
    model = open_model(path)
    assert "".join(generate(model, PROMPT, count)) == model.tokenizer.decode(ids[len(prompted) :])
