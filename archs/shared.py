"""What adapters have in common: checks, names of tensors in checkpoints, and the blocks that several families use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from ..errors import BadInput
from .catalogue import Catalogue, scale_block
from .config import Config
from .dimensions import Dimensions
from .encodings import Packing
from .expressions import Expression, Rows, TensorInfo
from .graph import MLP, Activation, Attention, Graph, HashRouter, Layer, MoE, Norm, Rope, Router, Yarn
from .weights import Role, Weight, check_shape

# The names that most families have in transformers, for `Names`.
WHOLE_NAMES = {
    "token_embd.weight": ("model.embed_tokens.weight",),
    "output_norm.weight": ("model.norm.weight",),
    "output.weight": ("lm_head.weight",),
}
ATTENTION_NAMES = {
    "attn_norm.weight": ("input_layernorm.weight",),
    "attn_q.weight": ("self_attn.q_proj.weight",),
    "attn_k.weight": ("self_attn.k_proj.weight",),
    "attn_v.weight": ("self_attn.v_proj.weight",),
    "attn_output.weight": ("self_attn.o_proj.weight",),
    "attn_q_norm.weight": ("self_attn.q_norm.weight",),
    "attn_k_norm.weight": ("self_attn.k_norm.weight",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
}

ATTENTION_BIAS_NAMES = {
    "attn_q.bias": ("self_attn.q_proj.bias",),
    "attn_k.bias": ("self_attn.k_proj.bias",),
    "attn_v.bias": ("self_attn.v_proj.bias",),
    "attn_output.bias": ("self_attn.o_proj.bias",),
}
DENSE_NAMES = {
    "ffn_gate.weight": ("mlp.gate_proj.weight",),
    "ffn_up.weight": ("mlp.up_proj.weight",),
    "ffn_down.weight": ("mlp.down_proj.weight",),
}

_HALVES = ("gate_exps.weight", "up_exps.weight")
YARN_FAST, YARN_SLOW = 32.0, 1.0  # rotations within the original context, of its authors and llama.cpp

Source = Callable[[str, tuple[int, ...]], Expression]  # GGUF name and shape of a weight -> its numbers


def check_heads(origin: str, heads: int, key_value_heads: int) -> None:
    if heads % key_value_heads:
        raise BadInput(f"{origin}: {heads} attention heads are not a multiple of {key_value_heads} key-value heads")


def check_top_k(origin: str, top_k: int, experts: int) -> None:
    if top_k > experts:
        raise BadInput(f"{origin}: num_experts_per_tok is {top_k}, expected at most the {experts} experts")


def check_rotary(origin: str, key: str, size: int, head_size: int) -> None:
    if size > head_size or size % 2:
        raise BadInput(f"{origin}: {key} is {size}, expected an even number up to the head size of {head_size}")


def expect_all(config: Config, allowed: Mapping[str, Sequence[object]]) -> None:
    """Assert that every key, where present, holds one of the values that are implemented."""
    for key, values in allowed.items():
        config.expect(key, *values)


def text_section(config: Config) -> Config:
    """The settings of the language model, which has a section of its own where others stand beside it."""
    text = config.section("text_config")
    return text if text.keys() else config


def rope_section(config: Config) -> Config:
    """The settings of rotary embeddings: `rope_scaling` where it holds any, as in transformers, else `rope_parameters`.

    What stands in such a section counts before what stands beside it.
    """
    old = config.section("rope_scaling")
    return old if old.keys() else config.section("rope_parameters")


def yarn_of(factor: float, original_context: int) -> Yarn:
    """YaRN as its authors and llama.cpp have it, with their limits and magnitude."""
    return Yarn(factor, original_context, YARN_FAST, YARN_SLOW, 1 + 0.1 * max(math.log(factor), 0))


def read_yarn(rope: Config, context: int, rounded: tuple[bool, ...] = (True,)) -> Yarn | None:
    """The scaling that a section of rotary settings asks for. Raises BadInput for any other than YaRN with its usual
    constants.

    Args:
        context: tokens that the model was trained with, unless the section says so.
        rounded: whether the family's limits between pairs may be rounded; that they are is what is not said.
    """
    kind = rope.text("rope_type", "type", default="default")
    if kind == "default":
        return None
    if kind != "yarn":
        raise BadInput(f"{rope.origin}: rope type is {kind!r}, expected 'yarn' or 'default'")
    yarn = yarn_of(rope.number("factor"), rope.integer("original_max_position_embeddings", default=context))
    rope.expect("beta_fast", yarn.fast)
    rope.expect("beta_slow", yarn.slow)
    rope.expect("attention_factor", yarn.magnitude)
    rope.expect("truncate", *rounded)
    return replace(yarn, rounded=rope.flag("truncate", default=True))


def catalogue_of(config: Config, tensors: Sequence[TensorInfo]) -> Catalogue:
    """The tensors of a checkpoint, with what its configuration alone says of their encodings.

    Raises BadInput for whole numbers of other sizes, or in another form, than are understood.
    """
    quantization, packing, uniform = config.section("quantization_config"), None, False
    match quantization.text("quant_method", default="none"):
        case "gptq":
            quantization.expect("bits", 4)
            quantization.expect("is_marlin_format", False)
            quantization.expect("checkpoint_format", "gptq", "gptq_v2")
            packing = Packing(quantization.text("checkpoint_format", default="gptq"))
            ordered = not quantization.flag("desc_act", default=False)
            uniform = quantization.flag("sym", default=True) and ordered
        case "awq":
            quantization.expect("bits", 4)
            quantization.expect("version", "gemm", "GEMM")
            packing = Packing.AWQ
    return Catalogue(tensors, config.origin, scale_block(config), packing, uniform)


@dataclass(frozen=True)
class Experts:
    """Names of a stack of experts below a layer, see `Catalogue.experts`."""

    separate: str
    fused: str
    half: int | None = None


EXPERT_NAMES = {
    "ffn_gate_exps.weight": Experts("mlp.experts.{}.gate_proj", "mlp.experts.gate_up_proj", half=0),
    "ffn_up_exps.weight": Experts("mlp.experts.{}.up_proj", "mlp.experts.gate_up_proj", half=1),
    "ffn_down_exps.weight": Experts("mlp.experts.{}.down_proj", "mlp.experts.down_proj"),
}


@dataclass(frozen=True)
class Names:
    """What the tensors of a family are called in checkpoints.

    Every GGUF name is followed by the names that occur, the Hub's first; whichever is there is taken. A name that ends
    with `.weight` is a matrix or a vector with whatever scales belong to it.

    Attributes:
        layers: what the names of a layer begin with, `{}` standing for its number.
        whole: GGUF names of weights outside the layers.
        layer: GGUF names below `blk.N.`.
        experts: those of stacks of experts.
        special: those that are taken in a way of their own, from the catalogue, name and shape.
    """

    layers: tuple[str, ...]
    whole: Mapping[str, tuple[str, ...]]
    layer: Mapping[str, tuple[str, ...]]
    experts: Mapping[str, Experts]
    special: Mapping[str, Callable[[Catalogue, str, tuple[int, ...]], Expression]] = field(default_factory=dict)


class CheckpointSource:
    """Finds the weights of a checkpoint by their GGUF names.

    Args:
        tied: whether the embedding is also the head, unless there is a tensor for it.
    """

    def __init__(self, catalogue: Catalogue, names: Names, tied: bool = False) -> None:
        self.catalogue = catalogue
        self.names = names
        self._tied = tied and not any(name in catalogue for name in names.whole["output.weight"])
        self._prefix = next(filter(catalogue.holds_below, names.layers), names.layers[0])
        self._whole = cache(self.take)

    def __call__(self, name: str, shape: tuple[int, ...]) -> Expression:
        if name == "output.weight" and self._tied:
            name = "token_embd.weight"
        if name in self.names.whole:
            return self._whole(self.names.whole[name])
        _, layer, kind = name.split(".", 2)
        return self.in_layer(self._prefix.format(layer), kind, shape)

    def in_layer(self, prefix: str, kind: str, shape: tuple[int, ...]) -> Expression:
        """The weight that a GGUF file calls `kind` in its layer, below a prefix of the checkpoint."""
        if kind in self.names.experts:
            names = self.names.experts[kind]
            return self.catalogue.experts(prefix + names.separate, prefix + names.fused, shape, names.half)
        candidates = tuple(prefix + candidate for candidate in self.names.layer[kind])
        if kind in self.names.special:
            return self.names.special[kind](self.catalogue, self._present(candidates), shape)
        return self.take(candidates)

    def take(self, candidates: tuple[str, ...]) -> Expression:
        """The first of the tensors that is there."""
        name = self._present(candidates)
        if name.endswith(".weight"):
            return self.catalogue.matrix(name.removesuffix(".weight"))
        return self.catalogue.plain(name)

    def _present(self, candidates: tuple[str, ...]) -> str:
        return next(filter(self.catalogue.holds, candidates), candidates[0])


def read_checkpoint(
    config: Config, tensors: Sequence[TensorInfo], names: Names, build: Callable[[Source], Graph]
) -> Graph:
    """The graph of a checkpoint that uses each of its tensors; the head may be the embedding."""
    catalogue = catalogue_of(config, tensors)
    graph = build(CheckpointSource(catalogue, names, config.flag("tie_word_embeddings", default=False)))
    return replace(graph, notes=catalogue.finish())


def open_gguf(metadata: Config, tensors: Sequence[TensorInfo]) -> tuple[Catalogue, int]:
    """The tensors of a GGUF file and its vocabulary size. Raises BadInput for a file without embedding."""
    catalogue = Catalogue(tensors, metadata.origin)
    embedding = next((tensor for tensor in tensors if tensor.name == "token_embd.weight"), None)
    if embedding is None:
        raise BadInput(f"{metadata.origin}: tensor token_embd.weight is missing, the file is incomplete")
    return catalogue, embedding.shape[0]


def gguf_source(catalogue: Catalogue) -> Source:
    """Finds the weights of a GGUF file; without a head of its own the embedding serves.

    Gate and up projection of experts may be one tensor, the gate's rows first, as llama.cpp's converter can write them.
    """
    stored = cache(catalogue.stored)
    head = "output.weight" if "output.weight" in catalogue else "token_embd.weight"

    def find(name: str, shape: tuple[int, ...]) -> Expression:
        block, _, kind = name.rpartition("ffn_")
        both = f"{block}ffn_gate_up_exps.weight"
        if kind in _HALVES and both in catalogue:
            found, start = stored(both), _HALVES.index(kind) * shape[1]
            check_shape(found, (shape[0], 2 * shape[1], shape[2]))
            return Rows(found, start, start + shape[1])
        return stored(head if name == "output.weight" else name)

    return find


class Builder:
    """Makes weights and blocks of a graph by their GGUF names; a family whose blocks differ makes its own."""

    def __init__(self, dimensions: Dimensions, epsilon: float, source: Source) -> None:
        self.hidden = dimensions.hidden
        self._dimensions = dimensions
        self._epsilon = epsilon
        self._source = source

    def weight(self, name: str, role: Role, *shape: int) -> Weight:
        return Weight(name, role, shape, self._source(name, shape))

    def norm(self, name: str, *shape: int) -> Norm:
        return Norm(self.weight(name, Role.NORM, *shape), self._epsilon)

    def graph(self, architecture: str, layers: tuple[Layer, ...], tied: bool = False) -> Graph:
        """Layers between embedding and head, or, `tied`, between the two uses of one weight."""
        vocabulary, hidden = self._dimensions.vocabulary, self.hidden
        embedding = self.weight("token_embd.weight", Role.HEAD if tied else Role.EMBEDDING, vocabulary, hidden)
        return Graph(
            architecture=architecture,
            vocabulary_size=vocabulary,
            hidden_size=hidden,
            context_length=self._dimensions.context,
            embedding=embedding,
            layers=layers,
            final_norm=self.norm("output_norm.weight", hidden),
            head=embedding if tied else self.weight("output.weight", Role.HEAD, vocabulary, hidden),
        )

    def attention(
        self,
        blk: str,
        heads: int,
        key_value_heads: int,
        head_size: int,
        rope: Rope | None = None,
        norms: tuple[int, int] | None = None,
        gated: bool = False,
    ) -> Attention:
        """Grouped-query attention.

        Args:
            blk: what GGUF names of the layer begin with.
            norms: widths of the norms of query and key, where there are any.
            gated: whether the query projection gives a gate too.
        """
        query_size, key_size = heads * head_size, key_value_heads * head_size
        return Attention(
            heads=heads,
            key_value_heads=key_value_heads,
            head_size=head_size,
            query=self.weight(f"{blk}.attn_q.weight", Role.ATTENTION_Q, (1 + gated) * query_size, self.hidden),
            key=self.weight(f"{blk}.attn_k.weight", Role.ATTENTION_K, key_size, self.hidden),
            value=self.weight(f"{blk}.attn_v.weight", Role.ATTENTION_V, key_size, self.hidden),
            output=self.weight(f"{blk}.attn_output.weight", Role.ATTENTION_OUTPUT, self.hidden, query_size),
            query_norm=self.norm(f"{blk}.attn_q_norm.weight", norms[0]) if norms else None,
            key_norm=self.norm(f"{blk}.attn_k_norm.weight", norms[1]) if norms else None,
            rope=rope,
            gated=gated,
        )

    def biased(self, blk: str, attention: Attention) -> Attention:
        """The same with a bias for each projection."""
        assert attention.key and attention.value

        def bias(kind: str, projection: Weight) -> Weight:
            return self.weight(f"{blk}.{kind}.bias", Role.BIAS, projection.shape[0])

        return replace(
            attention,
            query_bias=bias("attn_q", attention.query),
            key_bias=bias("attn_k", attention.key),
            value_bias=bias("attn_v", attention.value),
            output_bias=bias("attn_output", attention.output),
        )

    def gated_mlp(self, blk: str, size: int) -> MLP:
        """A dense SwiGLU layer of that inner width."""
        return MLP(
            gate=self.weight(f"{blk}.ffn_gate.weight", Role.DENSE_GATE, size, self.hidden),
            up=self.weight(f"{blk}.ffn_up.weight", Role.DENSE_UP, size, self.hidden),
            down=self.weight(f"{blk}.ffn_down.weight", Role.DENSE_DOWN, self.hidden, size),
            activation=Activation.SWIGLU,
        )

    def experts(
        self,
        blk: str,
        router: Router | HashRouter,
        activation: Activation,
        shape: tuple[int, int, int],
        shared: int = 0,
        clamp: float | None = None,
    ) -> MoE:
        """Routed experts.

        Args:
            shape: number of experts, width of an expert, width of its input.
            shared: width of the shared expert, 0 where there is none.
        """
        count, size, width = shape
        gated = activation is not Activation.RELU_SQUARED
        gate = self.weight(f"{blk}.ffn_gate_exps.weight", Role.EXPERT_GATE, *shape) if gated else None
        return MoE(
            router=router,
            gate=gate,
            up=self.weight(f"{blk}.ffn_up_exps.weight", Role.EXPERT_UP, *shape),
            down=self.weight(f"{blk}.ffn_down_exps.weight", Role.EXPERT_DOWN, count, width, size),
            activation=activation,
            clamp=clamp,
            shared=self._shared(blk, activation, shared, clamp) if shared else None,
        )

    def biased_experts(self, blk: str, experts: MoE) -> MoE:
        """The same with a bias for each projection of each expert."""
        assert experts.gate

        def bias(kind: str, projection: Weight) -> Weight:
            return self.weight(f"{blk}.{kind}.bias", Role.BIAS, *projection.shape[:2])

        return replace(
            experts,
            gate_bias=bias("ffn_gate_exps", experts.gate),
            up_bias=bias("ffn_up_exps", experts.up),
            down_bias=bias("ffn_down_exps", experts.down),
        )

    def _shared(self, blk: str, activation: Activation, size: int, clamp: float | None) -> MLP:
        gated = activation is not Activation.RELU_SQUARED
        gate = self.weight(f"{blk}.ffn_gate_shexp.weight", Role.SHARED_GATE, size, self.hidden) if gated else None
        return MLP(
            gate=gate,
            up=self.weight(f"{blk}.ffn_up_shexp.weight", Role.SHARED_UP, size, self.hidden),
            down=self.weight(f"{blk}.ffn_down_shexp.weight", Role.SHARED_DOWN, self.hidden, size),
            activation=activation,
            clamp=clamp,
        )
