"""What is measured on every trained example checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"
CHUNKS, CONTEXT = 8, 512


def evaluation_chunks(folder: Path) -> torch.Tensor:
    """Chunks spread evenly over the held-out text, so that every book has its say, int64 `[CHUNKS, CONTEXT]`."""
    text = (EXAMPLES / "text/evaluation.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids)
    chunks = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return chunks[:: len(chunks) // CHUNKS][:CHUNKS]


def best_unigram_perplexity(tokens: torch.Tensor) -> float:
    """No unigram model, not even one fitted to these very tokens, gets below."""
    frequencies = torch.bincount(tokens.flatten()) / tokens.numel()
    return math.exp(-(frequencies * frequencies.log()).nansum().item())


class ExpertShares:
    """Counts, while its `with` block runs, the tokens that routers send to each expert.

    A router's output has the chosen experts `[tokens, experts_per_token]` at position 2.
    """

    def __init__(self, routers: Sequence[torch.nn.Module], experts: int) -> None:
        self._counts = torch.zeros(len(routers), experts)
        self._routers = routers

    def __enter__(self) -> ExpertShares:
        self._hooks = [
            router.register_forward_hook(lambda _module, _inputs, outputs, row=row: self._count(row, outputs[2]))
            for row, router in enumerate(self._routers)
        ]
        return self

    def _count(self, row: int, chosen: torch.Tensor) -> None:
        self._counts[row] += torch.bincount(chosen.flatten(), minlength=self._counts.shape[1])

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def relative(self) -> torch.Tensor:
        """`[routers, experts]`; 1.0 is an equal share."""
        return self._counts / self._counts.mean(dim=1, keepdim=True)
