"""What several files against one look like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..reports.report import candidate_as_json
from ..sources.locate import model_name
from .console import human_bytes, print_columns, print_json
from .report import show_problems

if TYPE_CHECKING:
    from ..runner.measure.candidates import Candidate

_HEADER = ("File", "Size", "Bits", "KL divergence", "99.9 %", "Same top", "Perplexity")


def show_candidates(reference: Path, candidates: Sequence[Candidate], as_json: bool) -> None:
    """Several files side by side, the smallest first."""
    if as_json:
        first = candidates[0].parity
        shared = {"perplexity_reference": first.perplexity_reference, "tokens": first.tokens}
        print_json({"reference": reference, **shared, "candidates": [*map(candidate_as_json, candidates)]})
        return
    named = [*zip(_names(candidates), candidates, strict=True)]
    print_candidates(str(reference), candidates)
    show_problems(tuple(f"{name}: {line}" for name, candidate in named for line in candidate.parity.problems))


def print_candidates(reference: str, candidates: Sequence[Candidate]) -> None:
    """Their table, and a second one by category where there are several."""
    first, named = candidates[0].parity, [*zip(_names(candidates), candidates, strict=True)]
    title = f"Against {reference}: perplexity {first.perplexity_reference:.4f}, {first.tokens} tokens"
    print_columns(title, _HEADER, [_row(name, candidate) for name, candidate in named])
    if any(candidate.dominated for candidate in candidates):
        print("* another file is at most as large and at most as divergent")
    if len(categories := first.slices["category"]) > 1:
        rows = [(name, *_divergences(candidate)) for name, candidate in named]
        print_columns("KL divergence by category", ("File", *(text.name for text in categories)), rows)


def _names(candidates: Sequence[Candidate]) -> list[str]:
    """Those of the files, with their folders where two are alike."""
    names = [model_name(candidate.path) for candidate in candidates]
    if len(set(names)) < len(names):
        names = [str(candidate.path) for candidate in candidates]
    return names


def _row(name: str, candidate: Candidate) -> tuple[str, ...]:
    parity, bits = candidate.parity, candidate.bits_per_weight
    return (
        f"{name} *" if candidate.dominated else name,
        human_bytes(candidate.bytes),
        "" if bits is None else f"{bits:.2f}",
        f"{parity.mean_kld:.5f} ± {parity.mean_kld_error:.5f}",
        f"{parity.kld_999:.3f}",
        f"{parity.top1_agreement:.2%}",
        f"{parity.perplexity_ratio - 1:+.2%}",
    )


def _divergences(candidate: Candidate) -> list[str]:
    return [f"{text.mean_kld:.5f}" for text in candidate.parity.slices["category"]]
