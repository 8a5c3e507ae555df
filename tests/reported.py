"""Reports as large as models get, made up: what a page of one holds is known. And how pages are read."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import Element

import html5lib
from moecast.reports.report import ExpertTraffic, Provenance, Report, ReportedTensor
from moecast.runner.measure.candidates import Candidate
from moecast.runner.measure.evaluate import Parity
from moecast.runner.measure.slices import Slice

LAYERS, EXPERTS, STEP = 62, 256, 23
HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(1)>&amp; $x_1$ \x00\x1b[31m\u202etxt'
_ROLES = {  # type, bits per weight, rounding error
    "attention_q": ("Q6_K", 6.5625, 0.03),
    "attention_output": ("Q5_K", 5.5, 0.04),
    "expert_gate": ("IQ2_XXS", 2.0625, 0.4),
    "expert_down": ("IQ3_XXS", 3.0625, 0.25),
}


def large_report(name: str = "model.gguf") -> Report:
    """A conversion of 62 layers of 256 experts; layer 23 adds a large error. `name` stands wherever names do."""
    chance = random.Random(0)
    experts = [
        [0 if chance.random() < 0.01 else int(chance.lognormvariate(6, 1)) for _ in range(EXPERTS)]
        for _ in range(LAYERS)
    ]
    parity = _parity(name, chance)
    digest = "0123456789abcdef" * 4
    return Report(
        kind="conversion",
        title=name,
        provenance=Provenance(name, digest[:40], {"evaluation": (name, digest)}, {"moecast": "1"}, "2026", name),
        bytes=70 * 2**30,
        bits_per_weight=2.61,
        recipe=name,
        expected_kld=0.03,
        bytes_per_token=4e9,
        parity=parity,
        tensors=tuple(_tensors(name)),
        experts=tuple(ExpertTraffic(layer, tokens) for layer, tokens in enumerate(experts)),
        candidates=tuple(_candidate(name.replace("/", ""), number, parity) for number in range(1, 7)),
        problems=(name,),
    )


def _tensors(name: str) -> Iterator[ReportedTensor]:
    yield ReportedTensor(name, "embedding", None, "Q4_K", 2**29, 2**28, 0.06)
    for layer in range(LAYERS):
        yield ReportedTensor(f"blk.{layer}.attn_norm.weight", "norm", layer, "F32", 3072, 12288, 0.0, True)
        for role, (type, bits, error) in _ROLES.items():
            size = 3072 * 1536 * (EXPERTS if role.startswith("expert") else 4)
            own = error * (1 + layer / LAYERS)
            yield ReportedTensor(f"blk.{layer}.{role}.weight", role, layer, type, size, int(size * bits / 8), own)


def _parity(name: str, chance: random.Random) -> Parity:
    errors = [0.03]
    for layer in range(1, LAYERS):
        errors.append(errors[-1] + (0.05 if layer == STEP else 0.002 * chance.uniform(0.2, 1.8)))
    names = {
        "category": ["chat", "code", "日本語", "a category whose name is long", name],
        "position": [f"{first}-{first + 31}" for first in range(257, 512, 32)],
        "confidence": ["0-0.1", "0.1-0.25", "0.25-0.5", "0.5-0.75", "0.75-0.9", "0.9-0.99", "0.99-1"],
    }
    slices = {
        key: tuple(Slice(one, 1000, 0.02 * chance.uniform(0.3, 3), 0.002, 0.9) for one in members)
        for key, members in names.items()
    }
    return Parity(
        5.1, 5.3, 0.031, 0.0006, 0.8, 4.2, 0.93, -0.001, 0.03, tuple(errors), 8160, 512, 32, "float32", 196608, slices
    )


def _candidate(name: str, number: int, parity: Parity) -> Candidate:
    divergence = 0.2 / number
    own = replace(parity, mean_kld=divergence, mean_kld_error=divergence / 50, kld_999=30 * divergence)
    return Candidate(Path(f"{number}-{name}"), (60 + 10 * number) * 2**30, 2.0 + number / 3, own, number == 3)


def parsed(text: str) -> Element:
    """The document, in which the standard's parser finds no error."""
    parser = html5lib.HTMLParser(namespaceHTMLElements=False)
    tree = parser.parse(text)
    assert [(position, code) for position, code, _ in parser.errors] == []
    return tree


def words(tree: Element) -> str:
    return " ".join("".join(tree.itertext()).split())
