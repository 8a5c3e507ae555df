"""Settings of a run: which text it evaluates, and how it computes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BadInput
from .texts import DEFAULT_CONTEXT, EVALUATION_TEXT, chunk_tokens

if TYPE_CHECKING:  # a command line is checked before torch is loaded
    import torch
    from torch import Tensor

    from ..sources.tokenizer import Tokenizer

COMPUTE_DTYPES = ("float32", "bfloat16")
DEVICES = "auto, cpu, cuda, cuda:N or mps"


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
        dtype: name of the type of products with weights, except those that route tokens and those of the head:
            float32, or bfloat16, which is faster.
        threads: to quantize with, all cores by default.
        memory: most bytes this process may take; activations that do not fit go to a scratch file beside the output.
            No result depends on it. By default all of them stay in memory.
        device: name of what to compute on: cpu, cuda or cuda:N for an NVIDIA GPU, mps for an Apple one; auto takes the
            first NVIDIA GPU whose memory the model's largest parts fit in, and the CPU where there is none.
        vram: most bytes of an NVIDIA GPU's memory to take, by default nearly all that is free; activations that do not
            fit go to this process's memory.
    """

    dtype: str = "float32"
    threads: int | None = None
    memory: int | None = None
    device: str = "auto"
    vram: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in COMPUTE_DTYPES:
            raise BadInput(f"--compute-dtype is {self.dtype!r}, expected {' or '.join(COMPUTE_DTYPES)}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?|mps", self.device):
            raise BadInput(f"--device is {self.device!r}, expected {DEVICES}")

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        found: torch.dtype = getattr(torch, self.dtype)
        return found
