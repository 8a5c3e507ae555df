"""What each command's result looks like: a table for people, the same facts as JSON for scripts."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .console import human_bytes, human_count, print_columns, print_json, print_table

if TYPE_CHECKING:
    from pathlib import Path

    from .convert.calibrate import Calibration
    from .convert.pipeline import Conversion
    from .quant.plan import Plan
    from .runner.evaluate import Parity, Perplexity
    from .sources.model import Model


def show_model(model: Model, as_json: bool) -> None:
    graph = model.graph
    if as_json:
        from .archs.graph import describe

        tensors = [{"name": t.name, "dtype": t.dtype, "shape": t.shape, "bytes": t.length} for t in model.tensors]
        print_json(
            {
                "architecture": graph.architecture,
                "parameters": graph.parameters(),
                "active_parameters": graph.active_parameters(),
                "state_bytes_per_token": graph.state_bytes_per_token(),
                "tensors": tensors,
                "problems": graph.notes,
                "graph": describe(graph),
            }
        )
        return
    stored: Counter[str] = Counter()
    for tensor in model.tensors:
        stored[tensor.dtype] += tensor.length
    operations = Counter(type(operation).__name__ for operation in graph.operations())
    print_table(
        str(model.path),
        [
            ("Architecture", graph.architecture),
            ("Parameters", f"{human_count(graph.parameters())} ({human_count(graph.active_parameters())} active)"),
            ("Layers", f"{len(graph.layers)}: " + ", ".join(f"{n} x {kind}" for kind, n in operations.items())),
            ("Hidden size, vocabulary", f"{graph.hidden_size}, {graph.vocabulary_size}"),
            ("Stored", ", ".join(f"{dtype} {human_bytes(size)}" for dtype, size in stored.most_common())),
            ("KV cache per token", f"{human_bytes(graph.state_bytes_per_token())} (16 bits)"),
        ],
    )


def show_plan(plan: Plan, as_json: bool) -> None:
    if as_json:
        tensors = [
            {"name": t.weight.name, "type": t.type.name, "shape": t.weight.shape, "bytes": plan.bytes_of(t)}
            for t in plan.tensors
        ]
        print_json(
            {
                "bytes": plan.bytes,
                "bits_per_weight": plan.bits_per_weight,
                "tensors": tensors,
                "problems": plan.problems,
            }
        )
        return
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for tensor in plan.tensors:
        counts[tensor.weight.role.value, tensor.type.name] += 1
        sizes[tensor.weight.role.value, tensor.type.name] += plan.bytes_of(tensor)
    rows = [(role, name, str(counts[role, name]), human_bytes(size)) for (role, name), size in sizes.items()]
    title = f"{plan.recipe.name}: {human_bytes(plan.bytes)}, {plan.bits_per_weight:.2f} bits per weight"
    print_columns(title, ("Role", "Type", "Tensors", "Size"), rows)
    show_problems(plan.problems)


def show_perplexity(title: str, result: Perplexity, as_json: bool) -> None:
    if as_json:
        print_json(asdict(result))
        return
    value = f"{result.perplexity:.4f} ± {result.error:.4f}"
    print_table(title, [("Perplexity", value), ("Tokens scored", str(result.tokens))])


def show_parity(title: str, result: Parity, as_json: bool) -> None:
    if as_json:
        print_json(asdict(result))
    else:
        print_table(title, _parity_rows(result))


def show_conversion(result: Conversion, as_json: bool) -> None:
    if as_json:
        print_json(asdict(result))
        return
    rows = [("Size", f"{human_bytes(result.bytes)}, {result.bits_per_weight:.2f} bits per weight")]
    if result.parity:
        rows += _parity_rows(result.parity)
    rows.append(("Time, peak memory", f"{result.seconds:.1f} s, {human_bytes(result.peak_rss_bytes)}"))
    print_table(str(result.files[0]), rows)
    show_problems(result.problems)
    file = result.files[0]
    line = server_line(file) if file.suffix == ".gguf" else f'moecast run {file.parent} -p "Once upon a time"'
    print(f"Run it with\n\n    {line}\n")


def show_calibration(result: Calibration, as_json: bool) -> None:
    if as_json:
        print_json(asdict(result))
        return
    rows = [("Tokens", str(result.tokens))]
    if result.fewest_tokens is not None:
        rows.append(("Experts no token reached", str(result.unseen_experts)))
        rows.append(("Fewest tokens of an expert", str(result.fewest_tokens)))
    rows.append(("Time, peak memory", f"{result.seconds:.1f} s, {human_bytes(result.peak_rss_bytes)}"))
    print_table(str(result.file), rows)


def show_problems(problems: tuple[str, ...]) -> None:
    for problem in problems:
        print(f"Note: {problem}")


def server_line(path: Path) -> str:
    """The command that serves a file with llama.cpp on this machine: experts stay in RAM, the rest goes to a GPU."""
    arguments: list[Any] = ["llama-server", "-m", path, "-c", 8192, "-t", os.cpu_count(), "--jinja"]
    if shutil.which("nvidia-smi"):
        arguments += ["--n-gpu-layers", 99, "--cpu-moe"]
    return " ".join(str(argument) for argument in arguments)


def _parity_rows(result: Parity) -> list[tuple[str, str]]:
    return [
        ("Perplexity, source", f"{result.perplexity_reference:.4f}"),
        ("Perplexity, result", f"{result.perplexity_candidate:.4f} ({result.perplexity_ratio - 1:+.2%})"),
        ("Mean KL divergence", f"{result.mean_kld:.6f} ± {result.mean_kld_error:.6f}"),
        ("KL divergence, 99.9 %", f"{result.kld_999:.6f}"),
        ("Same top token", f"{result.top1_agreement:.2%}"),
        ("Δp of the right token", f"{result.mean_delta_p:+.3%} mean, {result.rms_delta_p:.3%} RMS"),
        ("Tokens scored", str(result.tokens)),
    ]
