"""Error feedback against rounding to what is nearest: squared errors of outputs, on text that calibration has not seen.

    python benchmarks/feedback.py [CHECKPOINT] [--chunks 32] [--time]

For weights of an example (rows of 256), the error of each type with error feedback over that without, both with the
same calibration: the geometric mean over weights and experts. First by types, and with the choice of levels that GPTQ
makes; then for less calibration, and for experts that have to do with what all experts of their layer read together.
The tables of docs/error-feedback.md come from here.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from moecast.archs.weights import Role, Weight
from moecast.quant import dequantize, quantize
from moecast.quant.rounding import feedback
from moecast.quant.rounding.moments import SecondMoments, products_of
from moecast.quant.rounding.statistics import SecondMomentStatistics
from moecast.runner.observe import ObservingWeights, observe_head
from moecast.runner.stream import Stream
from moecast.runner.texts import EVALUATION_TEXT, chunk_tokens, with_bos
from moecast.runner.weights import ModelWeights
from moecast.sources.model import Model, open_model
from torch import Tensor

TYPES = ("Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS")
EXAMPLE = Path(__file__).parents[1] / "examples" / "minimax-m2-tiny"
CALIBRATION_TEXT = EVALUATION_TEXT.with_name("calibration.txt")
CONTEXT, ROWS, EXPERTS, BLOCK = 512, 512, 4, 256


class Kept(SecondMomentStatistics):
    """Statistics of all layers."""

    def release(self, expert: int | None = None) -> None:
        self._last = None


def observed(model: Model, tokens: Tensor) -> Kept:
    statistics = Kept()
    weights = ObservingWeights(ModelWeights(model), statistics)
    stream = Stream(model, with_bos(tokens, model.tokenizer), weights=weights)
    for layer in model.graph.layers:
        stream.advance(layer)
    observe_head(stream, statistics)
    return statistics


def matrices(model: Model, experts_alone: bool = False) -> Iterator[tuple[Weight, int | None, Tensor]]:
    """Some rows of some experts of all weights that error feedback can round in blocks of 256."""
    for weight in model.graph.weights():
        alike = weight.experts and weight.role is not Role.EXPERT_DOWN
        if weight.role.keep_f32 or weight.columns % BLOCK or len(weight.shape) < 2 or (experts_alone and not alike):
            continue
        if weight.role is not Role.EMBEDDING:
            for expert in range(EXPERTS) if weight.experts else (None,):
                yield weight, expert, model.load(weight, expert)[:ROWS]


def full(moments: SecondMoments) -> Tensor:
    (means,) = moments.means
    return means.triu() + means.triu(1).T


Round = Callable[[Tensor, SecondMoments], Tensor]


def compare(model: Model, seen: Kept, others: Kept, name: str, fed_back: Round, experts_alone: bool = False) -> float:
    """The error of `fed_back`, over that without error feedback."""
    logarithms = []
    for weight, expert, rows in matrices(model, experts_alone):
        own, exit_if_worse = seen.moments(weight, [expert]), others.moments(weight, [expert])
        assert own and exit_if_worse
        nearest = quantize(rows, name, seen.of(weight, expert))
        errors = [dequantize(data, name) - rows for data in (fed_back(rows, own), nearest)]
        squares = [float(((error @ full(exit_if_worse)) * error).sum()) for error in errors]
        logarithms.append(math.log(squares[0] / squares[1]))
    return math.exp(sum(logarithms) / len(logarithms))


def with_sweeps(name: str, sweeps: int) -> Round:
    def round(rows: Tensor, moments: SecondMoments) -> Tensor:
        usual, feedback._SWEEPS = feedback._SWEEPS, sweeps  # type: ignore[misc]
        try:
            return feedback.quantize_with_feedback(rows[None], name, moments)[0]
        finally:
            feedback._SWEEPS = usual  # type: ignore[misc]

    return round


def by_type(model: Model, seen: Kept, others: Kept) -> None:
    print("| type | in turn (GPTQ) | and once more | and twice (ours) | time |")
    print("|---|---|---|---|---|")
    for name in TYPES:
        ratios = [compare(model, seen, others, name, with_sweeps(name, sweeps)) for sweeps in range(3)]
        found = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {name} | {found} | {slower(name):.0f}x |")


def slower(name: str) -> float:
    """Time with error feedback over time without, for rows of 2048; what the moments take is not in it."""
    rows, inputs = torch.randn(1024, 2048), torch.randn(4096, 2048)
    moments = SecondMoments((inputs.T @ inputs / len(inputs))[None], [len(inputs)])
    moments.cholesky(BLOCK)
    times = []
    for action in (
        lambda: feedback.quantize_with_feedback(rows[None], name, moments, threads=1),
        lambda: quantize(rows, name, moments.means[0].diagonal(), threads=1),
    ):
        action()
        started = time.process_time()
        action()
        times.append(time.process_time() - started)
    return times[0] / times[1]


def by_calibration(model: Model, chunks: int, others: Kept, name: str = "Q3_K") -> None:
    tokens = chunk_tokens(model.tokenizer, CALIBRATION_TEXT, CONTEXT, chunks)
    print(f"\n| {name}, tokens of calibration | all weights | experts, gate and up | from what all experts read |")
    print("|---|---|---|---|")

    def usual(rows: Tensor, moments: SecondMoments) -> Tensor:
        return feedback.quantize_with_feedback(rows[None], name, moments)[0]

    while len(tokens):
        seen = observed(model, tokens)
        everything = compare(model, seen, others, name, usual)
        own = compare(model, seen, others, name, usual, experts_alone=True)
        seen._own.clear()
        shared = compare(model, seen, others, name, usual, experts_alone=True)
        print(f"| {tokens.numel()} | {everything:.2f} | {own:.2f} | {shared:.2f} |")
        tokens = tokens[: len(tokens) // 4]


def times(rows: int = 1536, columns: int = 3072, tokens: int = 2048) -> None:
    """What a matrix of an expert of MiniMax M2 takes: nanoseconds of one core for each weight."""
    generator = torch.Generator().manual_seed(0)
    x, inputs = (torch.randn(count, columns, generator=generator) for count in (rows, tokens))
    products = products_of(inputs)
    moments = SecondMoments(products[None] / tokens, [tokens])

    def spent(action: Callable[..., object], *arguments: object) -> str:
        """The least of some times: other programs share the caches."""
        measured = []
        for _ in range(4):
            started = time.process_time()
            action(*arguments)
            measured.append(time.process_time() - started)
        return f"{min(measured) / x.numel() * 1e9:.0f}"

    factors = spent(lambda: SecondMoments(products[None] / tokens, [tokens]).cholesky(BLOCK))
    print(f"moments of {tokens} tokens: {spent(products_of, inputs)}, their factors: {factors}\n")
    print("| type | without | blocks alone | with error feedback |\n|---|---|---|---|")
    for name in TYPES:
        without = spent(quantize, x, name, moments.means[0].diagonal(), 1)
        alone = spent(blocks_alone, x, name, moments)
        print(f"| {name} | {without} | {alone} | {spent(feedback.quantize_with_feedback, x[None], name, moments, 1)} |")


def blocks_alone(x: Tensor, name: str, moments: SecondMoments) -> None:
    """Scales, levels and bytes of all blocks, without what carries errors from one to the next."""
    cholesky, group = moments.cholesky(BLOCK), feedback._grid(name).group
    for number, block in enumerate(zip(cholesky.blocks, cholesky.weights, strict=True)):
        values = x[None, :, number * BLOCK : (number + 1) * BLOCK]
        feedback._round(name, values, None, feedback._coupling(*block, group), torch.empty_like(values), threads=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=EXAMPLE)
    parser.add_argument("--chunks", type=int, default=32, help="of calibration")
    parser.add_argument("--time", action="store_true", help="measure only what it takes, for each weight")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.time:
        times()
        return
    model = open_model(options.checkpoint)
    calibration = chunk_tokens(model.tokenizer, CALIBRATION_TEXT, CONTEXT, options.chunks)
    others = observed(model, chunk_tokens(model.tokenizer, EVALUATION_TEXT, CONTEXT, 24))
    by_type(model, observed(model, calibration), others)
    by_calibration(model, options.chunks, others)


if __name__ == "__main__":
    main()
