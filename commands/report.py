"""What each command's result looks like: a table for people, the same facts as JSON for scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import zip_longest
from typing import TYPE_CHECKING

from ..reports.rows import parity_rows, scoring_rows
from .console import human_bytes, human_count, print_columns, print_json, print_table
from .serving import Serving, this_machine
from .terminal import printable

if TYPE_CHECKING:
    from ..convert.calibrate import MeasuredMatrix
    from ..convert.conversion import Conversion
    from ..quant.planning.fit import Machine, MachinePlan
    from ..quant.planning.plan import Plan
    from ..runner.measure.acceptance import Acceptance
    from ..runner.measure.evaluate import Parity, Perplexity
    from ..sources.imatrix import ImportanceMatrix
    from ..sources.model import Model

_CONTEXT = 8192  # tokens that a server is told to keep where nobody says how many


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


def show_fit(fit: MachinePlan, as_json: bool, each: bool = False) -> None:
    serving = Serving("MODEL.gguf", fit.plan.graph, fit.machine.context, True, fit)
    if as_json:
        from ..quant.planning.plan_file import plan_as_json

        print_json({**plan_as_json(fit.plan), **serving.facts()})
        return
    show_plan(fit.plan, as_json, each)
    serving.show()


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


def show_acceptance(title: str, result: Acceptance, as_json: bool) -> None:
    if as_json:
        tokens = [
            {**asdict(token), "rate": token.rate, "reached": reached}
            for token, reached in zip(result.tokens, result.reached, strict=True)
        ]
        derived = {"tokens_per_pass": result.tokens_per_pass, "problems": result.problems}
        print_json({**asdict(result), "tokens": tokens, **derived})
        return
    rows = [
        (
            str(number),
            f"{token.rate:.1%}",
            "" if token.confidence is None else f"{token.confidence:.1%}",
            f"{reached:.1%}",
            str(token.drafts),
        )
        for number, (token, reached) in enumerate(zip(result.tokens, result.reached, strict=True), 1)
    ]
    header = ("Drafted token", "Accepted after the one before", "As the draft expects", "Of all drafts", "Drafts")
    print_columns(title, header, rows)
    print(f"Tokens that a pass of the model says: {result.tokens_per_pass:.2f}")
    show_problems(result.problems)


def show_conversion(result: Conversion, as_json: bool, machine: Machine | None = None) -> None:
    """With how to run it on a machine, by default this one."""
    serving = serving_of(result, machine)
    if as_json:
        print_json(conversion_as_json(result, serving))
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
    if serving:
        serving.show()
    else:
        print(f"Run it with\n\n    {printable(run_line(result, serving))}\n")


def conversion_as_json(result: Conversion, serving: Serving | None) -> dict[str, object]:
    facts = {field.name: getattr(result, field.name) for field in fields(result) if field.name != "details"}
    return {**facts, **(serving.facts() if serving else {})}


def run_line(result: Conversion, serving: Serving | None) -> str:
    """The command that runs what was made."""
    return serving.line() if serving else f'moecast run {result.files[0].parent} -p "Once upon a time"'


def serving_of(result: Conversion, machine: Machine | None = None) -> Serving | None:
    """How llama.cpp runs a file on a machine, by default this one; None for what it does not run."""
    from ..quant.planning.fit import placed
    from ..sources.gguf import read_gguf
    from ..sources.tokenizer_gguf import CHAT_TEMPLATE

    if result.files[0].suffix != ".gguf":
        return None
    machine, plan = machine or this_machine(_CONTEXT), result.details.plan
    template = CHAT_TEMPLATE in read_gguf(result.files[0])[0]
    return Serving(result.files[0], plan.graph, machine.context, template, placed(plan, machine), result.draft)


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
