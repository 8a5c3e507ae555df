"""Settings of a run: which text it evaluates, and how it computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..sources.tokenizer import Tokenizer
from .texts import DEFAULT_CONTEXT, EVALUATION_TEXT, chunk_tokens


@dataclass(frozen=True)
class Evaluation:
    """What models are evaluated on: `chunks` chunks of `context` tokens of a text, by default all of it."""

    text: str | Path = EVALUATION_TEXT
    context: int = DEFAULT_CONTEXT
    chunks: int | None = None

    def tokens(self, tokenizer: Tokenizer) -> Tensor:
        """Token ids, int64 [chunks, context]. Raises BadInput for a text that cannot be read or is too short."""
        return chunk_tokens(tokenizer, Path(self.text), self.context, self.chunks)


@dataclass(frozen=True)
class Compute:
    """With what is computed.

    Attributes:
        dtype: of products with weights, except those that route tokens and those of the head: float32, or bfloat16,
            which is faster.
        threads: to quantize with, all cores by default.
        memory: most bytes this process may take; activations that do not fit go to a scratch file beside the output.
            No result depends on it. By default all of them stay in memory.
    """

    dtype: torch.dtype = torch.float32
    threads: int | None = None
    memory: int | None = None


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16, of torch.bfloat16"""
    return str(dtype).removeprefix("torch.")
