"""What `train.py` has to know about an architecture; one module per architecture provides it."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from tokenizers import AddedToken
from tokenizers.normalizers import Normalizer
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sizes:
    """Dimensions common to every mixture-of-experts transformer; the architecture derives the rest from them."""

    layers: int
    hidden_size: int
    intermediate_size: int
    """Inner width of one routed expert."""
    experts: int
    experts_per_token: int
    vocabulary: int
    """Tokens, special tokens included."""
    context: int
    """`max_position_embeddings`."""


class Router(NamedTuple):
    """A routing module in the model and where its decisions are."""

    module: torch.nn.Module
    bias: torch.Tensor | None
    """Selection bias `[experts]`, float32, updated in place by the load balancer; None where a loss has to balance."""
    selected: int
    """Position of the chosen expert indices `[tokens, experts_per_token]` in the module's output tuple.

    Without a bias, the logits `[tokens, experts]` are at position 0.
    """


class Architecture(Protocol):
    """The interface of an architecture module (`self` is the module)."""

    DEFAULT_SIZES: Sizes
    NORMALIZER: Normalizer | None
    """What is done to text before it is split."""
    PRE_TOKENIZER_PATTERNS: tuple[str, ...]
    """Regular expressions that split text before byte-level BPE, one after the other."""
    FIRST_TOKENS: tuple[AddedToken, ...]
    """Added tokens that take the first ids of the vocabulary, in this order."""
    LAST_TOKENS: tuple[AddedToken, ...]
    """Added tokens that take the last ids."""
    BEGIN_OF_TEXT: str | None
    """None where texts begin without a token."""
    END_OF_TEXT: str
    GENERATION_DEFAULTS: dict[str, Any]
    CHAT_TEMPLATE: str | None
    """Jinja source, if checkpoints are published with one."""
    SHARDS: int
    """Number of safetensors files to write."""

    def build(self, sizes: Sizes) -> PreTrainedModel:
        """A float32 model with uninitialized or default weights."""

    def routers(self, model: PreTrainedModel) -> list[Router]:
        """The routers that are trained to use all experts, in layer order."""

    def hub_config(self, sizes: Sizes) -> dict[str, Any]:
        """config.json with the keys of the published checkpoints."""

    def hub_tensors(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The trained weights under the names and in the dtypes of the published checkpoints, in file order."""

    def shard_name(self, number: int, shards: int) -> str:
        """File name of shard `number` (counted from 0) of `shards`."""
