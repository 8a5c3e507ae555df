"""The complete tensor lists of the published Nemotron 3 checkpoints: names, shapes and dtypes, without the numbers.

`tests/archs` checks tensor counts and bytes against the totals of the published files where those are known. Lists
of variants whose headers are not known follow the recipe of their nearest sibling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import prod

from moecast.archs.expressions import TensorInfo

DTYPE_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
VOCABULARY, HEAD, KEY_VALUE, STATE, GROUPS = 131072, 128, 256, 128, 8

Entry = tuple[str, tuple[int, ...], str]


@dataclass(frozen=True)
class Model:
    """One family member; `router` is the dtype of its routers, `latent` is 0 for experts in the full width."""

    pattern: str
    hidden: int
    mamba_heads: int
    heads: int
    experts: int
    expert_size: int
    shared_size: int
    latent: int
    router: str
    drafts: bool

    def layers(self, kind: str) -> list[int]:
        return [index for index, letter in enumerate(self.pattern) if letter == kind]


NANO = Model("MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", 2688, 64, 32, 128, 1856, 3712, 0, "F32", False)
LIGHTNING = Model(NANO.pattern, 2688, 64, 32, 128, 1856, 3712, 0, "F32", True)
SUPER = Model(
    "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    4096, 128, 32, 512, 2688, 5376, 1024, "BF16", True,
)  # fmt: skip
ULTRA = Model(
    "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    8192, 256, 64, 512, 5120, 10240, 2048, "BF16", True,
)  # fmt: skip

# Super in NVFP4 is a mixture: these modules are FP8, the routed experts and one shared down projection are NVFP4,
# everything else is BF16.
_SUPER_FP8 = {
    "in_proj": "0 2 4 6 9 11 13 15 18 20 27 29 31 40 49 51 53 55 57 60 62 66 68 71 73 82 84 86",
    "out_proj": "0 2 4 9 11 13 18 38 40 42 44 49 51 53 55 57 60 62 64 66 68 71 73 75 77 80 82 84 86",
    "shared_experts.up_proj": "1 3 5 8 10 12 14 17 19 21 23 26 28 30 32 34 37 39 43 45 48 50 52 54 56 59 61 63 65 67 "
    "70 72 74 76 79 81 83 85 87",
    "shared_experts.down_proj": "3 5 10 12 14 17 19 21 23 26 28 30 32 34 37 39 41 43 45 48 50 52 54 56 59 61 63 65 67 "
    "70 72 74 79 81 83 85 87",
    "fc1_latent_proj": "1 3 5",
    "fc2_latent_proj": "3",
    "o_proj": "69 78",
}


def bf16(model: Model) -> tuple[TensorInfo, ...]:
    return _infos(_plain(model))


def nvfp4(model: Model) -> tuple[TensorInfo, ...]:
    """Nano: everything linear but attention and the Mamba layers before it. Others: experts, with FP8 around them."""
    if model is SUPER:
        fp8 = {f"backbone.layers.{n}.mixer.{name}" for name, all in _SUPER_FP8.items() for n in all.split()}
        extra = "backbone.layers.1.mixer.shared_experts.down_proj"
        return _modelopt(model, lambda m: m == extra or _is_expert(m), fp8.__contains__, cache_scales=True)
    if model is NANO:
        kept = tuple(f"backbone.layers.{index - 1}." for index in model.layers("*"))
        return _modelopt(
            model, lambda m: _is_expert(m) or (_is_linear(m) and not m.startswith(kept)), _none, cache_scales=False
        )
    return _modelopt(model, _is_expert, _is_linear, cache_scales=True, activations=model is not LIGHTNING)


def fp8(model: Model) -> tuple[TensorInfo, ...]:
    """Everything but attention, latent projections and drafting; Nano keeps the Mamba layers before attention."""
    kept = tuple(f"backbone.layers.{index - 1}." for index in model.layers("*")) if not model.latent else ()
    return _modelopt(
        model, _none, lambda m: _is_expert(m) or (_is_linear(m) and not m.startswith(kept)), cache_scales=True
    )


def _none(module: str) -> bool:
    return False


def _is_expert(module: str) -> bool:
    return module.startswith("backbone.") and ".experts." in module


def _is_linear(module: str) -> bool:
    return module.startswith("backbone.") and module.endswith(
        (".in_proj", ".out_proj", "shared_experts.up_proj", "shared_experts.down_proj")
    )


def _modelopt(
    model: Model,
    is_nvfp4: Callable[[str], bool],
    is_fp8: Callable[[str], bool],
    cache_scales: bool,
    activations: bool = True,
) -> tuple[TensorInfo, ...]:
    def entries() -> Iterator[Entry]:
        for name, shape, dtype in _plain(model):
            module = name.removesuffix(".weight")
            if is_nvfp4(module):
                rows, columns = shape
                yield name, (rows, columns // 2), "U8"
                yield f"{module}.weight_scale", (rows, columns // 16), "F8_E4M3"
                yield f"{module}.weight_scale_2", (), "F32"
            elif is_fp8(module):
                yield name, shape, "F8_E4M3"
                yield f"{module}.weight_scale", (), "F32"
            else:
                yield name, shape, dtype
                continue
            if activations:
                yield f"{module}.input_scale", (), "F32"
        for layer in model.layers("*") if cache_scales else ():
            yield f"backbone.layers.{layer}.mixer.k_proj.k_scale", (), "F32"
            yield f"backbone.layers.{layer}.mixer.v_proj.v_scale", (), "F32"

    return _infos(entries())


def _plain(model: Model) -> Iterator[Entry]:
    yield "backbone.embeddings.weight", (VOCABULARY, model.hidden), "BF16"
    yield "backbone.norm_f.weight", (model.hidden,), "BF16"
    yield "lm_head.weight", (VOCABULARY, model.hidden), "BF16"
    for index, kind in enumerate(model.pattern):
        yield from _layer(model, f"backbone.layers.{index}", kind)
    if model.drafts:
        yield from _layer(model, "mtp.layers.0", "*")
        yield from _layer(model, "mtp.layers.1", "E")
        for norm in ("0.enorm", "0.hnorm", "1.final_layernorm"):
            yield f"mtp.layers.{norm}.weight", (model.hidden,), "BF16"
        yield "mtp.layers.0.eh_proj.weight", (model.hidden, 2 * model.hidden), "BF16"


def _layer(model: Model, layer: str, kind: str) -> Iterator[Entry]:
    hidden, mixer = model.hidden, f"{layer}.mixer"
    yield f"{layer}.norm.weight", (hidden,), "BF16"
    if kind == "M":
        inner = model.mamba_heads * 64
        channels = inner + 2 * GROUPS * STATE
        yield f"{mixer}.in_proj.weight", (inner + channels + model.mamba_heads, hidden), "BF16"
        yield f"{mixer}.conv1d.weight", (channels, 1, 4), "BF16"
        yield f"{mixer}.conv1d.bias", (channels,), "BF16"
        for scalar in ("dt_bias", "A_log", "D"):
            yield f"{mixer}.{scalar}", (model.mamba_heads,), "BF16"
        yield f"{mixer}.norm.weight", (inner,), "BF16"
        yield f"{mixer}.out_proj.weight", (hidden, inner), "BF16"
    elif kind == "*":
        query = model.heads * HEAD
        shapes = {"q": (query, hidden), "k": (KEY_VALUE, hidden), "v": (KEY_VALUE, hidden), "o": (hidden, query)}
        for letter, shape in shapes.items():
            yield f"{mixer}.{letter}_proj.weight", shape, "BF16"
    else:
        yield f"{mixer}.gate.weight", (model.experts, hidden), model.router
        yield f"{mixer}.gate.e_score_correction_bias", (model.experts,), "F32"
        width = model.latent or hidden
        for expert in range(model.experts):
            yield f"{mixer}.experts.{expert}.up_proj.weight", (model.expert_size, width), "BF16"
            yield f"{mixer}.experts.{expert}.down_proj.weight", (width, model.expert_size), "BF16"
        yield f"{mixer}.shared_experts.up_proj.weight", (model.shared_size, hidden), "BF16"
        yield f"{mixer}.shared_experts.down_proj.weight", (hidden, model.shared_size), "BF16"
        if model.latent:
            yield f"{mixer}.fc1_latent_proj.weight", (model.latent, hidden), "BF16"
            yield f"{mixer}.fc2_latent_proj.weight", (hidden, model.latent), "BF16"


def _infos(entries: Iterator[Entry]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(n, dtype, s, "hub", 0, prod(s) * DTYPE_BYTES[dtype]) for n, s, dtype in entries)


CONFIGS = {
    "nano": "nemotron-3-nano",
    "lightning": "nemotron-3.5-lightning",
    "super": "nemotron-3-super",
    "ultra": "nemotron-3-ultra",
}
MODELS = {"nano": NANO, "lightning": LIGHTNING, "super": SUPER, "ultra": ULTRA}
ENCODINGS = {"bf16": bf16, "fp8": fp8, "nvfp4": nvfp4}


@cache
def tensors(model: str, encoding: str) -> tuple[TensorInfo, ...]:
    return ENCODINGS[encoding](MODELS[model])
