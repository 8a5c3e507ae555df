"""What each command's result looks like: a table for people, the same facts as JSON for scripts."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import zip_longest
from typing import TYPE_CHECKING

from ..reports.rows import parity_rows, scoring_rows
from .console import human_bytes, human_count, print_columns, print_json, print_table
from .terminal import printable

if TYPE_CHECKING:
    from pathlib import Path

    from ..convert.calibrate import MeasuredMatrix
    from ..convert.conversion import Conversion
    from ..quant.planning.fit import MachinePlan
    from ..quant.planning.plan import Plan
    from ..runner.measure.evaluate import Parity, Perplexity
    from ..sources.imatrix import ImportanceMatrix
    from ..sources.model import Model

_CONTEXT = 8192  # tokens that a server is told to keep where nobody says how many
_TEMPLATE = "--jinja"  # llama-server's option to use the file's chat template
_GPU = ("--n-gpu-layers", 99)  # llama-server's options for all layers on a GPU, but for the experts that others exclude


def show_model(model: Model, as_json: bool) -> None:
    graph = model.graph
    if as_json:
        from ..archs.graph import graph_as_json

        tensors = [{"name": t.name, "dtype": t.dtype, "shape": t.shape, "bytes": t.length} for t in model.tensors]
        print_json(
            {
                "architecture": graph.architecture,
                "parameters": graph.parameters(),
                "active_parameters": graph.active_parameters(),
                "state_bytes_per_token": graph.state_bytes_per_token(),
                "fixed_state_bytes": graph.fixed_state_bytes(),
                "tensors": tensors,
                "problems": graph.notes,
                "graph": graph_as_json(graph),
            }
        )
        return
    stored: Counter[str] = Counter()
    for tensor in model.tensors:
        stored[tensor.dtype] += tensor.length
    operations = Counter(type(operation).__name__ for operation in graph.operations())
    fixed = graph.fixed_state_bytes()
    print_table(
        str(model.path),
        [
            ("Architecture", graph.architecture),
            ("Parameters", f"{human_count(graph.parameters())} ({human_count(graph.active_parameters())} active)"),
            ("Layers", f"{len(graph.layers)}: " + ", ".join(f"{n} x {kind}" for kind, n in operations.items())),
            ("Hidden size, vocabulary", f"{graph.hidden_size}, {graph.vocabulary_size}"),
            ("Stored", ", ".join(f"{dtype} {human_bytes(size)}" for dtype, size in stored.most_common())),
            ("KV cache per token", f"{human_bytes(graph.state_bytes_per_token())} (16 bits)"),
            *([("State of any text", human_bytes(fixed))] if fixed else []),
        ],
    )
    show_problems(graph.notes)


def show_plan(plan: Plan, as_json: bool, each: bool = False) -> None:
    """A plan by roles and layers; before that tensor by tensor, where `each` asks for it."""
    from ..quant.planning.allocation import bytes_per_token
    from ..quant.planning.plan_file import plan_as_json
    from ..reports.gather import planned_tensors
    from ..reports.report import grouped

    if as_json:
        print_json(plan_as_json(plan))
        return
    if each:
        show_tensors(plan)
    rows = [
        (group.role, group.type, group.layers, str(group.tensors), human_bytes(group.bytes))
        for group in grouped(planned_tensors(plan))
    ]
    title = f"{plan.recipe.name}: {human_bytes(plan.bytes)}, {plan.bits_per_weight:.2f} bits per weight"
    print_columns(title, ("Role", "Type", "Layers", "Tensors", "Size"), rows)
    if plan.expected_kld is not None:
        print(f"Expected KL divergence: {plan.expected_kld:.5f}")
    print(f"Weights that a token touches: {human_bytes(bytes_per_token(plan))}")
    show_problems(plan.problems)


def show_plans(plans: Sequence[Plan], as_json: bool) -> None:
    """One, or several of one model."""
    from ..quant.planning.plan_file import plan_as_json

    if as_json and len(plans) > 1:
        print_json({"plans": [plan_as_json(plan) for plan in plans]})
        return
    for plan in plans:
        show_plan(plan, as_json)


def show_tensors(plan: Plan) -> None:
    """Every tensor in file order, its shape slowest dimension first."""
    rows = [
        (t.weight.name, t.type.name, " x ".join(map(str, t.weight.shape)), str(plan.bytes_of(t))) for t in plan.tensors
    ]
    print_columns(f"{plan.recipe.name}, {len(rows)} tensors", ("Tensor", "Type", "Shape", "Bytes"), rows)


def show_fit(fit: MachinePlan, bandwidth: float, as_json: bool, each: bool = False) -> None:
    """`bandwidth`: bytes a second that this machine reads from its memory."""
    if as_json:
        from ..quant.planning.plan_file import plan_as_json

        memory = {"state_bytes": fit.state_bytes, "working_bytes": fit.working_bytes}
        speed = {"ram_bytes_per_token": fit.ram_bytes_per_token, "memory_bandwidth": bandwidth}
        lines = {"serve": _serve(fit), "chat": _serve(fit, "llama-cli")}
        print_json({**plan_as_json(fit.plan), **memory, **speed, "layers_in_ram": fit.layers_in_ram, **lines})
        return
    show_plan(fit.plan, as_json, each)
    print(f"State of {fit.machine.context} tokens: {human_bytes(fit.state_bytes)}, ", end="")
    print(f"working memory: about {human_bytes(fit.working_bytes)}")
    if fit.ram_bytes_per_token:
        rate = bandwidth / fit.ram_bytes_per_token
        print(
            f"A token reads {human_bytes(fit.ram_bytes_per_token)} of weights from RAM: at most "
            f"{rate:.{0 if rate >= 10 else 1}f} tokens a second, if RAM is as fast as this machine's "
            f"({human_bytes(bandwidth)}/s measured now) and what lies on a GPU costs nothing"
        )
    print(f"Serve it, or chat with it, by\n\n    {_serve(fit)}\n    {_serve(fit, 'llama-cli')}\n")


def _serve(fit: MachinePlan, program: str = "llama-server") -> str:
    """With the options for a GPU; the head counts as a layer beside those that the GPU holds as a whole."""
    options: tuple[str | int, ...] = ()
    if fit.machine.vram:
        graph = fit.plan.graph
        on_gpu = ("--n-gpu-layers", len(graph.layers) - fit.layers_in_ram + 1)
        options = (*_GPU, "--n-cpu-moe", fit.layers_in_ram) if graph.experts else on_gpu
    return server_line("MODEL.gguf", fit.machine.context, _TEMPLATE, *options, program=program)


def show_perplexity(title: str, result: Perplexity, as_json: bool) -> None:
    if as_json:
        print_json({**asdict(result), "problems": result.problems})
        return
    value = f"{result.perplexity:.4f} ± {result.error:.4f}"
    print_table(title, [("Perplexity", value), *scoring_rows(result)])
    show_problems(result.problems)


def show_parity(title: str, result: Parity, as_json: bool) -> None:
    if as_json:
        print_json({**asdict(result), "problems": result.problems})
        return
    print_table(title, parity_rows(result))
    _show_categories(result)
    show_problems(result.problems)


def show_conversion(result: Conversion, as_json: bool) -> None:
    if as_json:
        print_json(conversion_as_json(result))
        return
    rows = [("Size", f"{human_bytes(result.bytes)}, {result.bits_per_weight:.2f} bits per weight")]
    if result.parity:
        rows += parity_rows(result.parity)
    runs = " in all runs" if result.resumed else ""
    rows.append(("Time, peak memory", f"{result.seconds:.1f} s{runs}, {human_bytes(result.peak_rss_bytes)}"))
    print_table(str(result.files[0]), rows)
    if result.parity:
        _show_categories(result.parity)
    show_problems(result.problems)
    print(f"Run it with\n\n    {printable(run_line(result))}\n")


def conversion_as_json(result: Conversion) -> dict[str, object]:
    return {field.name: getattr(result, field.name) for field in fields(result) if field.name != "details"}


def run_line(result: Conversion) -> str:
    """The command that runs what was made."""
    from ..sources.gguf import read_gguf
    from ..sources.tokenizer_gguf import CHAT_TEMPLATE

    file = result.files[0]
    if file.suffix != ".gguf":
        return f'moecast run {file.parent} -p "Once upon a time"'
    metadata = read_gguf(file)[0]
    routed = f"{metadata.get('general.architecture')}.expert_count" in metadata
    experts = (*_GPU, "--cpu-moe") if routed and shutil.which("nvidia-smi") else ()
    template = (_TEMPLATE,) if CHAT_TEMPLATE in metadata else ()
    return server_line(file, _CONTEXT, "-t", os.cpu_count(), *template, *experts)


def show_calibration(result: MeasuredMatrix, as_json: bool) -> None:
    if as_json:
        print_json(asdict(result))
        return
    rows = [("Tokens", str(result.tokens))]
    if result.fewest_tokens is not None:
        rows.append(("Experts no token reached", str(result.unseen_experts)))
        rows.append(("Fewest tokens of an expert", str(result.fewest_tokens)))
    rows.append(("Time, peak memory", f"{result.seconds:.1f} s, {human_bytes(result.peak_rss_bytes)}"))
    print_table(str(result.file), rows)


def show_imatrix(matrix: ImportanceMatrix, as_json: bool) -> None:
    tokens = matrix.chunks * matrix.chunk_size
    experts = [int(count) for counts in matrix.expert_counts.values() for count in counts]
    unseen, fewest = experts.count(0), min(experts, default=None)
    if as_json:
        facts = {"file": matrix.file, "datasets": matrix.datasets, "sha256": matrix.digests, "source": matrix.source}
        counted = {"chunks": matrix.chunks, "tokens": tokens, "weights": len(matrix.means)}
        coverage = {"experts": len(experts), "unseen_experts": unseen, "fewest_tokens": fewest}
        print_json({**facts, **counted, **coverage})
        return
    named = zip_longest(matrix.datasets, (f" ({digest[:12]})" for digest in matrix.digests), fillvalue="")
    texts = ", ".join(name + digest for name, digest in named)
    rows = [
        ("Texts", texts or "unknown"),
        ("Tokens", f"{tokens}, {matrix.chunks} chunks of {matrix.chunk_size}" if tokens else "unknown"),
        ("Weights", str(len(matrix.means))),
    ]
    if experts:
        rows.append(("Experts no token reached", f"{unseen} of {len(experts)}"))
        rows.append(("Fewest tokens of an expert", str(fewest)))
    rows += [(key.removeprefix("moecast.").capitalize(), value) for key, value in matrix.source.items()]
    print_table(matrix.file, rows)


def show_problems(problems: tuple[str, ...]) -> None:
    for problem in problems:
        print(f"Note: {printable(problem)}")


def server_line(model: str | Path, context: int, *options: object, program: str = "llama-server") -> str:
    """The command that serves a file with llama.cpp, or chats with it."""
    return " ".join(map(str, (program, "-m", model, "-c", context, *options)))


def _show_categories(result: Parity) -> None:
    """A table of the texts where there are several."""
    texts = result.slices["category"]
    if len(texts) > 1:
        header = ("Text", "Tokens scored", "Mean KL divergence", "Same top token")
        rows = [
            (
                text.name,
                str(text.tokens),
                f"{text.mean_kld:.6f} ± {text.mean_kld_error:.6f}",
                f"{text.top1_agreement:.2%}",
            )
            for text in texts
        ]
        print_columns("By category", header, rows)
