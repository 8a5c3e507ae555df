"""The texts that calibrate and evaluate, and how they become chunks of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..documents import read_text
from ..errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from ..sources.tokenizer import Tokenizer

DEFAULT_CONTEXT = 512  # tokens
_TEXTS = Path(__file__).parents[1] / "examples" / "text"
EVALUATION_TEXT = _TEXTS / "evaluation.txt"
CALIBRATION_TEXT = _TEXTS / "diverse.txt"
_CATEGORIES = _TEXTS / "categories"


def bundled_categories() -> dict[str, Path]:
    """Small texts of many kinds by the name of what each is an example of, as `Evaluation` takes them."""
    return {file.stem.replace("-", " "): file for file in sorted(_CATEGORIES.glob("*.txt"))}


def chunk_tokens(tokenizer: Tokenizer, file: Path, context: int, chunks: int | None) -> Tensor:
    """The text as int64 [chunks, context]. Raises BadInput when it is too short or the context too small."""
    import torch  # here, so that the settings that name these texts come without it

    if context < 4:
        raise BadInput(f"--context is {context}, expected at least 4 tokens")
    ids = tokenizer.encode(evaluated_text(file))
    if len(ids) < 2 * context:
        raise BadInput(
            f"{file} holds {len(ids)} tokens, expected at least {2 * context}: use more text or less --context"
        )
    count = len(ids) // context if chunks is None else min(chunks, len(ids) // context)
    if count < 1:
        raise BadInput(f"--chunks is {chunks}, expected at least 1")
    return torch.tensor(ids[: count * context], dtype=torch.int64, device="cpu").view(count, context)


def evaluated_text(file: Path) -> str:
    """What models read of a text file, without the newline at its end. Raises BadInput for one that is no UTF-8."""
    return read_text(file).removesuffix("\n")


def beyond_context(context: int, made_for: int) -> tuple[str, ...]:
    """A line where a context is longer than what a model is made for."""
    if context <= made_for:
        return ()
    return (f"--context {context} is beyond the {made_for} tokens the model is made for",)


def with_bos(tokens: Tensor, tokenizer: Tokenizer) -> Tensor:
    """llama-perplexity puts the BOS token in place of each chunk's first token, where the model has one."""
    if not tokenizer.add_bos or tokenizer.bos is None:
        return tokens
    tokens = tokens.clone()
    tokens[:, 0] = tokenizer.bos
    return tokens
