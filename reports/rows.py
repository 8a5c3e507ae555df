"""What is said of a result in a table: a name and its value in each row."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..runner.measure.evaluate import Parity, Perplexity


def parity_rows(result: Parity) -> list[tuple[str, str]]:
    return [
        ("Perplexity, source", f"{result.perplexity_reference:.4f}"),
        ("Perplexity, result", f"{result.perplexity_candidate:.4f} ({result.perplexity_ratio - 1:+.2%})"),
        ("Mean KL divergence", f"{result.mean_kld:.6f} ± {result.mean_kld_error:.6f}"),
        ("KL divergence, 99.9 %", f"{result.kld_999:.6f}"),
        ("Same top token", f"{result.top1_agreement:.2%}"),
        ("Token ids that differ", "not checked" if result.tokenization is None else str(result.tokenization)),
        ("Δp of the right token", f"{result.mean_delta_p:+.3%} mean, {result.rms_delta_p:.3%} RMS"),
        *scoring_rows(result),
    ]


def scoring_rows(result: Perplexity | Parity) -> list[tuple[str, str]]:
    rows = [("Tokens scored", str(result.tokens))]
    return rows if result.compute_dtype == "float32" else [*rows, ("Products computed in", result.compute_dtype)]
