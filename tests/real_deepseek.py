"""The complete tensor lists of the published DeepSeek V4 checkpoints: names, shapes and dtypes, without the numbers.

`tests/archs` checks tensor counts and bytes against the totals of the published files where those are known; the list
of the pruned 0731 derivative is read from the headers of its 48 shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path

from moecast.archs.expressions import TensorInfo

DTYPE_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "I64": 8}
HEAD, OUTPUT_RANK, INDEX_HEADS, INDEX_HEAD = 512, 1024, 64, 128
HEADERS = Path(__file__).parent / "data" / "deepseek-v4-flash-0731-reap-headers.txt"

Entry = tuple[str, tuple[int, ...], str]


@dataclass(frozen=True)
class Model:
    """One family member. `experts_dtype` is I8 (packed FP4), F8_E4M3 or BF16; `scale` the dtype of FP8 scales."""

    hidden: int
    heads: int
    query_rank: int
    groups: int
    experts: int
    expert_size: int
    ratios: tuple[int, ...]
    hash_layers: int = 3
    experts_dtype: str = "I8"
    scale: str = "F8_E8M0"
    drafts: int = 1  # 1: multi-token prediction, 3: a DSpark draft
    vocabulary: int = 129280

    def tensors(self) -> Iterator[Entry]:
        yield "embed.weight", (self.vocabulary, self.hidden), "BF16"
        yield "head.weight", (self.vocabulary, self.hidden), "BF16"
        yield from self.ending("")
        for index, ratio in enumerate(self.ratios):
            yield from self.block(f"layers.{index}.", ratio, index < self.hash_layers)
        for index in range(self.drafts):
            yield from self.block(f"mtp.{index}.", 0, hashed=False)
        if self.drafts == 1:
            yield from self.linear("mtp.0.e_proj", self.hidden, self.hidden)
            yield from self.linear("mtp.0.h_proj", self.hidden, self.hidden)
            yield "mtp.0.enorm.weight", (self.hidden,), "BF16"
            yield "mtp.0.hnorm.weight", (self.hidden,), "BF16"
            yield from self.ending("mtp.0.")
        elif self.drafts == 3:
            yield from self.linear("mtp.0.main_proj", self.hidden, 3 * self.hidden)
            yield "mtp.0.main_norm.weight", (self.hidden,), "BF16"
            yield from self.ending("mtp.2.")
            yield "mtp.2.markov_head.markov_w1.weight", (self.vocabulary, 256), "BF16"
            yield "mtp.2.markov_head.markov_w2.weight", (self.vocabulary, 256), "BF16"
            yield "mtp.2.confidence_head.proj.weight", (1, self.hidden + 256), "BF16"

    def linear(self, module: str, rows: int, columns: int) -> Iterator[Entry]:
        yield f"{module}.weight", (rows, columns), "F8_E4M3"
        yield f"{module}.scale", (-(-rows // 128), -(-columns // 128)), self.scale

    def expert(self, module: str, rows: int, columns: int) -> Iterator[Entry]:
        if self.experts_dtype == "F8_E4M3":
            yield from self.linear(module, rows, columns)
        elif self.experts_dtype == "BF16":
            yield f"{module}.weight", (rows, columns), "BF16"
        else:
            yield f"{module}.weight", (rows, columns // 2), "I8"
            yield f"{module}.scale", (rows, columns // 32), "F8_E8M0"

    def ending(self, prefix: str) -> Iterator[Entry]:
        yield f"{prefix}norm.weight", (self.hidden,), "BF16"
        yield f"{prefix}hc_head_fn", (4, 4 * self.hidden), "F32"
        yield f"{prefix}hc_head_base", (4,), "F32"
        yield f"{prefix}hc_head_scale", (1,), "F32"

    def block(self, prefix: str, ratio: int, hashed: bool) -> Iterator[Entry]:
        yield from self.attention(f"{prefix}attn.", ratio)
        for name in ("attn", "ffn"):
            yield f"{prefix}{name}_norm.weight", (self.hidden,), "BF16"
            yield f"{prefix}hc_{name}_fn", (24, 4 * self.hidden), "F32"
            yield f"{prefix}hc_{name}_base", (24,), "F32"
            yield f"{prefix}hc_{name}_scale", (3,), "F32"
        ffn = f"{prefix}ffn."
        yield f"{ffn}gate.weight", (self.experts, self.hidden), "BF16"
        yield (
            (f"{ffn}gate.tid2eid", (self.vocabulary, 6), "I64")
            if hashed
            else (f"{ffn}gate.bias", (self.experts,), "F32")
        )
        for name in (f"experts.{expert}" for expert in range(self.experts)):
            yield from self.expert(f"{ffn}{name}.w1", self.expert_size, self.hidden)
            yield from self.expert(f"{ffn}{name}.w2", self.hidden, self.expert_size)
            yield from self.expert(f"{ffn}{name}.w3", self.expert_size, self.hidden)
        yield from self.linear(f"{ffn}shared_experts.w1", self.expert_size, self.hidden)
        yield from self.linear(f"{ffn}shared_experts.w2", self.hidden, self.expert_size)
        yield from self.linear(f"{ffn}shared_experts.w3", self.expert_size, self.hidden)

    def attention(self, prefix: str, ratio: int) -> Iterator[Entry]:
        width, ranks = self.heads * HEAD, self.groups * OUTPUT_RANK
        yield f"{prefix}attn_sink", (self.heads,), "F32"
        yield f"{prefix}q_norm.weight", (self.query_rank,), "BF16"
        yield f"{prefix}kv_norm.weight", (HEAD,), "BF16"
        yield from self.linear(f"{prefix}wq_a", self.query_rank, self.hidden)
        yield from self.linear(f"{prefix}wq_b", width, self.query_rank)
        yield from self.linear(f"{prefix}wkv", HEAD, self.hidden)
        yield from self.linear(f"{prefix}wo_a", ranks, width // self.groups)
        yield from self.linear(f"{prefix}wo_b", self.hidden, ranks)
        if ratio:
            yield from self.compressor(f"{prefix}compressor", ratio, HEAD)
        if ratio == 4:
            yield from self.compressor(f"{prefix}indexer.compressor", ratio, INDEX_HEAD)
            yield from self.linear(f"{prefix}indexer.wq_b", INDEX_HEADS * INDEX_HEAD, self.query_rank)
            yield f"{prefix}indexer.weights_proj.weight", (INDEX_HEADS, self.hidden), "BF16"

    def compressor(self, module: str, ratio: int, size: int) -> Iterator[Entry]:
        width = 2 * size if ratio == 4 else size
        yield f"{module}.ape", (ratio, width), "F32"
        yield f"{module}.norm.weight", (size,), "BF16"
        yield f"{module}.wkv.weight", (width, self.hidden), "BF16"
        yield f"{module}.wgate.weight", (width, self.hidden), "BF16"


FLASH = Model(4096, 64, 1024, 8, 256, 2048, (0, 0, *20 * (4, 128), 4))
PRO = Model(7168, 128, 1536, 16, 384, 3072, (128, 128, *29 * (4, 128), 4))
MODELS = {
    "flash": FLASH,
    "flash-0731": replace(FLASH, drafts=3),
    "flash-base": replace(FLASH, experts_dtype="F8_E4M3", scale="F32"),
    "pro": PRO,
    "pro-base": replace(PRO, experts_dtype="F8_E4M3", scale="F32"),
}
CONFIGS = {
    "flash": "deepseek-v4-flash",
    "flash-0731": "deepseek-v4-flash-0731",
    "flash-base": "deepseek-v4-flash",
    "pro": "deepseek-v4-pro",
    "pro-base": "deepseek-v4-pro",
}


@cache
def tensors(name: str) -> tuple[TensorInfo, ...]:
    return listed(MODELS[name])


def listed(model: Model) -> tuple[TensorInfo, ...]:
    return tuple(_info(name, dtype, shape, "hub") for name, shape, dtype in model.tensors())


@cache
def pruned_0731() -> tuple[TensorInfo, ...]:
    """The headers of all shards of a 0731 derivative with 160 experts, in one line for each run of experts."""
    infos = []
    for line in HEADERS.read_text().splitlines():
        shard, name, dtype, sizes, *experts = line.split()
        shape = tuple(int(size) for size in sizes.split(","))
        file = f"model-{int(shard):05d}-of-00048.safetensors"
        if not experts:
            infos.append(_info(name, dtype, shape, file))
        else:
            first, last = map(int, experts[0].split("-"))
            infos += [_info(name.format(expert), dtype, shape, file) for expert in range(first, last + 1)]
    return tuple(infos)


def _info(name: str, dtype: str, shape: tuple[int, ...], file: str) -> TensorInfo:
    return TensorInfo(name, dtype, shape, file, 0, prod(shape) * DTYPE_BYTES[dtype])
