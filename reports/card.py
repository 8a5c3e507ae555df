"""The model card of published files, README.md: what the Hub sorts by, what was measured and on what, how to run it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from shlex import quote

from ..archs.llama_options import start_options
from ..quant.planning.allocation import bytes_per_token
from ..quant.planning.fit import Machine, layers_in_ram
from .card_metadata import base_model, front_matter
from .folder import PublishedFile, PublishedFolder, plan_names
from .gather import planned_tensors
from .markdown import code, code_block, literal, table
from .report import grouped
from .text import human_bytes

_GIB = 2**30
_GPU = 24  # GiB
_RAM = (32, 64, 96, 128, 192, 256, 512)  # GiB
_USUAL_RAM = 64
_CONTEXT = 32768  # tokens


@dataclass(frozen=True)
class Statement:
    """Faults that the publisher knows of, and why the files are published all the same."""

    faults: Sequence[str]
    reason: str


def card(folder: PublishedFolder, repository: str, statement: Statement | None = None) -> str:
    """README.md for a repository, `owner/name`."""
    sections = [
        _introduction(folder, repository),
        _files(folder),
        _types(folder),
        _machines(folder),
        _run_lines(folder, repository),
        _how_measured(folder),
        _traps(folder, statement),
    ]
    return f"---\n{front_matter(folder, repository)}\n---\n" + "\n\n".join(filter(None, sections)) + "\n"


def _introduction(folder: PublishedFolder, repository: str) -> str:
    metadata, base = folder.files[0].metadata, base_model(folder)
    revision, version = metadata.get("moecast.source.revision"), metadata.get("moecast.version")
    source = f"[{literal(base)}](https://huggingface.co/{base})" if base else literal(metadata.get("general.name"))
    commit = f" at commit {code(revision)}" if revision else ""
    maker = f", made by moecast {literal(version)}" if version else ""
    measured = " [report.html](report.html) shows what was measured, `report.json` holds the same as data."
    return (
        f"# {literal(repository.partition('/')[2])}\n\n"
        f"GGUF files of {source}{commit} for llama.cpp{maker}. Types tensor by tensor are in "
        f"{_listed(plan_names(folder))}." + (measured if any(file.report for file in folder.files) else "")
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(code, names))


def _files(folder: PublishedFolder) -> str:
    head = (
        "File", "Size", "Bits per weight", "Mean KL divergence", "99.9 %", "Same top token", "Perplexity ratio",
        "Read for a token", "Best of its size",
    )  # fmt: skip
    marks = folder.are_comparable and len(folder.files) > 1
    dominated = {candidate.path.name for candidate in folder.candidates if candidate.dominated}
    rows = [(*_row(file), "no" if file.parts[0].name in dominated else "yes") for file in folder.files]
    shown = table(head if marks else head[:-1], rows if marks else [row[:-1] for row in rows], range(1, 8))
    notes = ["KL divergence is that from the source, in nats, with its standard error; 0 is the same model."]
    if marks:
        notes.append("A file is not the best of its size when another is no larger and no farther from the source.")
    elif len(folder.files) > 1:
        notes.append("These files were not measured on the same tokens: compare none of these figures across rows.")
    return f"## Files\n\n{shown}\n\n{' '.join(notes)}"


def _row(file: PublishedFile) -> tuple[str, ...]:
    found = file.report.parity if file.report else None
    measured = (
        (
            f"{found.mean_kld:.5f} ± {found.mean_kld_error:.5f}",
            f"{found.kld_999:.4f}",
            f"{found.top1_agreement:.2%}",
            f"{found.perplexity_ratio:.4f}",
        )
        if found
        else ("not measured",) * 4
    )
    name = code(file.parts[0].name) + (f" and {len(file.parts) - 1} more" if len(file.parts) > 1 else "")
    sizes = human_bytes(file.bytes), f"{file.plan.bits_per_weight:.2f}"
    return name, *sizes, *measured, human_bytes(bytes_per_token(file.plan))


def _types(folder: PublishedFolder) -> str:
    by_file = [_types_by_role(file) for file in folder.files]
    roles = list(dict.fromkeys(role for types in by_file for role in types))
    rows = [(role.replace("_", " "), *(types.get(role, "") for types in by_file)) for role in roles]
    shown = table(("Weights", *(code(file.name) for file in folder.files)), rows)
    return f"## Types\n\n{shown}\n\nWhat is small and decides much (norms, routers, states) is in F32 and not listed."


def _types_by_role(file: PublishedFile) -> dict[str, str]:
    """The types of each role's weights, those of most bytes first."""
    groups = grouped([tensor for tensor in planned_tensors(file.plan) if not tensor.protected])
    return {
        role: ", ".join(group.type for group in sorted(members, key=lambda group: group.bytes, reverse=True))
        for role, members in groupby(groups, key=lambda group: group.role)
    }


def _machines(folder: PublishedFolder) -> str:
    shown = table(
        ("File", *(f"{ram} GB of RAM" for ram in _RAM)),
        [(code(file.name), *(_fits(file, ram) for ram in _RAM)) for file in folder.files],
    )
    return (
        f"## Which machines\n\nWith a GPU of {_GPU} GB and {_context(folder.files[0])} tokens of context, the options "
        f"that place the experts; they are estimates, and what stands empty does not fit.\n\n{shown}"
    )


def _fits(file: PublishedFile, ram: int) -> str:
    layers = _layers_in_ram(file, ram)
    return "" if layers is None else f"`-ncmoe {layers}`" if layers else "all on the GPU"


def _layers_in_ram(file: PublishedFile, ram: int) -> int | None:
    return layers_in_ram(file.plan, Machine(ram * _GIB, _GPU * _GIB, _context(file)))


def _context(file: PublishedFile) -> int:
    return min(_CONTEXT, file.plan.graph.context_length)


def _run_lines(folder: PublishedFolder, repository: str) -> str:
    file = next((one for one in reversed(folder.files) if _layers_in_ram(one, _USUAL_RAM) is not None), folder.files[0])
    layers = _layers_in_ram(file, _USUAL_RAM) or 0
    first, tag = file.parts[0].name, file.recipe if file.is_stock and file.recipe in file.name else file.parts[0].name
    options = f"-c {_context(file)} -ngl 99" + (f" -ncmoe {layers}" if layers else "")
    options = " ".join((options, *start_options(file.plan.graph)))
    draft = f" -md {quote(file.draft.name)}" if file.draft else ""
    included = " ".join(f"--include {quote(path.name)}" for path in file.paths)
    parts = [
        "## How to run\n\nllama.cpp; the experts of the first `-ncmoe` layers stay in RAM, here as many as a GPU of "
        f"{_GPU} GB and {_USUAL_RAM} GB of RAM need:",
        code_block(
            [
                f"hf download {repository} {included} --local-dir .",
                f"llama-server -m {quote(first)} {options}{draft} --jinja",
                f"llama-cli -m {quote(first)} {options} --jinja",
            ]
        ),
        "All experts stay in RAM with `-ot exps=CPU` in place of `-ncmoe`.",
    ]
    if len(file.parts) == 1:
        parts += ["Ollama and LM Studio:", code_block(_other_engines(repository, tag))]
    else:
        parts.append("Ollama takes no file in parts; LM Studio finds the repository by its name.")
    return "\n\n".join(parts)


def _other_engines(repository: str, tag: str) -> list[str]:
    return [f"ollama run hf.co/{repository}:{tag}", f"lms get https://huggingface.co/{repository}@{tag.lower()}"]


def _how_measured(folder: PublishedFolder) -> str:
    parts = ["## How it was measured"]
    for file in folder.files:
        report = file.report
        if report is None or report.parity is None:
            continue
        found = report.parity
        lines = [
            f"{code(file.name)}: {found.tokens} tokens scored, the second half of each of {found.chunks} chunks of "
            f"{found.context} tokens, in the source and in the file, by one program.",
            *(
                f"- {literal(use)}: {literal(name)}, SHA-256 {code(sha256)}"
                for use, (name, sha256) in report.provenance.texts.items()
            ),
            f"- versions: {literal(', '.join(map(' '.join, report.provenance.versions.items())))}",
        ]
        parts.append("\n".join(lines))
        if report.provenance.command:
            parts += ["Repeated by", code_block([report.provenance.command])]
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _traps(folder: PublishedFolder, statement: Statement | None) -> str:
    lines = [f"- {literal(problem)}" for problem in _problems(folder)]
    parts = ["## What to know\n\n" + "\n".join(lines)] if lines else []
    if statement:
        faults = "\n".join(f"- {literal(fault)}" for fault in statement.faults)
        parts.append(f"## Known faults\n\n{faults}\n\nPublished all the same: {literal(statement.reason)}")
    return "\n\n".join(parts)


def _problems(folder: PublishedFolder) -> Iterator[str]:
    """What reports warn of, with the file's name unless all say it."""
    by_file = {file.name: file.report.problems if file.report else () for file in folder.files}
    shared = set.intersection(*map(set, by_file.values()))
    for name, problems in by_file.items():
        for problem in problems:
            if problem not in shared:
                yield f"{name}: {problem}"
            elif name == folder.files[0].name:
                yield problem
