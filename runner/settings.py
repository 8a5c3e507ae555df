"""Settings of a run: which text it evaluates, and how it computes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BadInput
from .texts import DEFAULT_CONTEXT, EVALUATION_TEXT, chunk_tokens, evaluated_text

if TYPE_CHECKING:  # a command line is checked before torch is loaded
    import torch
    from torch import Tensor

    from ..sources.tokenizer import Tokenizer

COMPUTE_DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("model", "full")
DEVICES = "auto, cpu, cuda, cuda:N or mps"


@dataclass(frozen=True)
class Evaluation:
    """What models are evaluated on.

    Attributes:
        text: a file; None where there are categories alone.
        context: tokens in a chunk.
        chunks: most chunks of each text, by default all of it.
        categories: more files, each by the name of what it is an example of.
    """

    text: str | Path | None = EVALUATION_TEXT
    context: int = DEFAULT_CONTEXT
    chunks: int | None = None
    categories: Mapping[str, str | Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.text is None and not self.categories:
            raise BadInput("--file is missing, expected it or --text: a text to evaluate on")
        if self.text is not None and Path(self.text).stem in self.categories:
            raise BadInput(f"--text {Path(self.text).stem} has the name of --file {self.text}: give it another")

    @property
    def texts(self) -> dict[str, Path]:
        """All files in the order of their chunks, by category; `text` is one by its file's name."""
        first = {} if self.text is None else {Path(self.text).stem: Path(self.text)}
        return first | {name: Path(file) for name, file in self.categories.items()}

    def tokens_by_text(self, tokenizer: Tokenizer) -> dict[str, Tensor]:
        """Token ids of each text, int64 [chunks, context]. Raises BadInput for one that is unreadable or too short."""
        return {name: chunk_tokens(tokenizer, file, self.context, self.chunks) for name, file in self.texts.items()}

    def tokens(self, tokenizer: Tokenizer) -> Tensor:
        """The token ids of all texts, int64 [chunks, context]. Raises as `tokens_by_text`."""
        import torch

        return torch.cat([*self.tokens_by_text(tokenizer).values()])

    def read(self) -> str:
        """All texts, one after another."""
        return "\n".join(map(evaluated_text, self.texts.values()))


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


@dataclass(frozen=True)
class Opening:
    """How a model is opened that is to be run.

    Attributes:
        attention: what tokens attend to: `model`, what it is made to pick, or `full`, all tokens before.
        low_memory: whether ONNX Runtime uses the weights where they lie in the file.
    """

    attention: str = "model"
    low_memory: bool = False

    def __post_init__(self) -> None:
        if self.attention not in ATTENTIONS:
            raise BadInput(f"--attention is {self.attention!r}, expected {' or '.join(ATTENTIONS)}")
