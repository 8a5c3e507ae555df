"""The complete tensor lists of published MiniMax M3 checkpoints: names, shapes and dtypes, without the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from math import prod

import real_models
from moecast.archs.config import Config
from moecast.archs.expressions import TensorInfo

_DTYPE_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}

_Stored = Iterator[tuple[str, tuple[int, ...], str]]
_Encoding = Callable[[str, int, int], _Stored]  # a matrix by its module, rows and columns


def _plain(module: str, rows: int, columns: int) -> _Stored:
    yield f"{module}.weight", (rows, columns), "BF16"


def _mxfp8(module: str, rows: int, columns: int) -> _Stored:
    yield f"{module}.weight", (rows, columns), "F8_E4M3"
    yield f"{module}.weight_scale", (rows, columns // 32), "U8"


def _mxfp8_inverse(module: str, rows: int, columns: int) -> _Stored:
    """MiniMax's own, whose scales have the name that those of blocks have."""
    yield f"{module}.weight", (rows, columns), "F8_E4M3"
    yield f"{module}.weight_scale_inv", (rows, columns // 32), "U8"


def _nvfp4(module: str, rows: int, columns: int) -> _Stored:
    yield f"{module}.weight", (rows, columns // 2), "U8"
    yield f"{module}.weight_scale", (rows, columns // 16), "F8_E4M3"
    for suffix in ("weight_scale_2", "input_scale"):
        yield f"{module}.{suffix}", (), "F32"


ENCODINGS: dict[str, tuple[_Encoding, _Encoding]] = {  # of experts, of what else is large in layers
    "BF16": (_plain, _plain),
    "NVFP4": (_nvfp4, _mxfp8),
    "MXFP8": (_mxfp8_inverse, _mxfp8_inverse),
}


def config() -> Config:
    """The published one, which is that of NVIDIA's release but for what that says of encodings."""
    return real_models.config("minimax-m3-nvfp4")


@cache
def tensors(encoding: str = "BF16") -> tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo(name, dtype, shape, "hub", 0, prod(shape) * _DTYPE_BYTES[dtype])
        for name, shape, dtype in (*_language_model(*ENCODINGS[encoding]), *_vision_tower())
    )


def _language_model(experts: _Encoding, encoded: _Encoding) -> _Stored:
    text, prefix = config().section("text_config"), "language_model.model"
    key, sparse = text.get, text.section("sparse_attention_config").get
    hidden, size = key("hidden_size"), key("head_dim")
    queries, keys = key("num_attention_heads") * size, key("num_key_value_heads") * size
    yield f"{prefix}.embed_tokens.weight", (key("vocab_size"), hidden), "BF16"
    yield f"{prefix}.norm.weight", (hidden,), "BF16"
    yield "language_model.lm_head.weight", (key("vocab_size"), hidden), "BF16"
    for layer in range(key("num_hidden_layers")):
        blk, attention = f"{prefix}.layers.{layer}", f"{prefix}.layers.{layer}.self_attn"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{blk}.{norm}.weight", (hidden,), "BF16"
        for name, rows, columns in (("q", queries, hidden), ("k", keys, hidden), ("v", keys, hidden)):
            yield from encoded(f"{attention}.{name}_proj", rows, columns)
        yield from encoded(f"{attention}.o_proj", hidden, queries)
        for norm in ("q_norm", "k_norm"):
            yield f"{attention}.{norm}.weight", (size,), "BF16"
        if sparse("sparse_attention_freq")[layer]:
            index = sparse("sparse_index_dim")
            yield from encoded(f"{attention}.index_q_proj", sparse("sparse_num_index_heads") * index, hidden)
            yield from encoded(f"{attention}.index_k_proj", index, hidden)
            for norm in ("index_q_norm", "index_k_norm"):
                yield f"{attention}.{norm}.weight", (index,), "BF16"
        if not key("moe_layer_freq")[layer]:
            yield from _gated(f"{blk}.mlp", hidden, key("dense_intermediate_size"), encoded)
            continue
        mixture = f"{blk}.block_sparse_moe"
        yield f"{mixture}.gate.weight", (key("num_local_experts"), hidden), "F32"
        yield f"{mixture}.e_score_correction_bias", (key("num_local_experts"),), "F32"
        yield from _gated(f"{mixture}.shared_experts", hidden, key("shared_intermediate_size"), encoded)
        for expert in range(key("num_local_experts")):
            yield from experts(f"{mixture}.experts.{expert}.w1", key("intermediate_size"), hidden)
            yield from experts(f"{mixture}.experts.{expert}.w2", hidden, key("intermediate_size"))
            yield from experts(f"{mixture}.experts.{expert}.w3", key("intermediate_size"), hidden)


def _gated(module: str, hidden: int, size: int, encoded: _Encoding) -> _Stored:
    yield from encoded(f"{module}.gate_proj", size, hidden)
    yield from encoded(f"{module}.up_proj", size, hidden)
    yield from encoded(f"{module}.down_proj", hidden, size)


def _vision_tower() -> _Stored:
    hidden, size, outer, projected, patch = 1280, 5120, 6144, 6144, 14
    tower = "vision_tower.vision_model"
    yield f"{tower}.embeddings.patch_embedding.weight", (hidden, 3, 2, patch, patch), "F32"
    yield from _biased(f"{tower}.pre_layrnorm", hidden)
    for layer in range(32):
        blk = f"{tower}.encoder.layers.{layer}"
        for norm in ("layer_norm1", "layer_norm2"):
            yield from _biased(f"{blk}.{norm}", hidden)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _biased(f"{blk}.self_attn.{name}", hidden, hidden)
        yield from _biased(f"{blk}.mlp.fc1", size, hidden)
        yield from _biased(f"{blk}.mlp.fc2", hidden, size)
    yield from _biased("multi_modal_projector.linear_1", projected, hidden)
    yield from _biased("multi_modal_projector.linear_2", outer, projected)
    yield from _biased("patch_merge_mlp.linear_1", projected, 4 * outer)
    yield from _biased("patch_merge_mlp.linear_2", outer, projected)


def _biased(module: str, *shape: int) -> _Stored:
    yield f"{module}.weight", shape, "BF16"
    yield f"{module}.bias", shape[:1], "BF16"
