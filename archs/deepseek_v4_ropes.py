"""DeepSeek V4's two rotary embeddings in config.json, in all the ways that they are spelled.

Layers with compressed entries have a base of their own, and YaRN; the others have neither. On the Hub both bases stand
beside `rope_scaling`, whose YaRN is that of compressed layers; newer tools call it `rope_parameters`, flat or with a
section for each embedding, by name or by type of layer. What stands in a section counts before what stands beside it.
"""

from __future__ import annotations

from typing import Any

from ..errors import BadInput
from .config import Config
from .deepseek_v4_blocks import YARN_FAST, YARN_SLOW
from .shared import rope_section

_MAIN = ("main", "sliding_attention")
_COMPRESSED = ("compress", "compressed_sparse_attention", "heavily_compressed_attention")
_FLAT_SECTION = "compress_rope_parameters"
_BASE, _COMPRESSED_BASE = 10000.0, 160000.0  # what transformers takes where nothing is said


def read_ropes(config: Config) -> dict[str, Any]:
    """The quantities of both. Raises BadInput for a scaling that is not implemented, and for sections that differ."""
    ropes = rope_section(config)
    base = config.number("rope_theta", default=_BASE)
    compressed_base = config.number("compress_rope_theta", default=_COMPRESSED_BASE)
    main = [ropes.section(name) for name in _MAIN if name in ropes]
    compressed = [ropes.section(name) for name in _COMPRESSED if name in ropes]
    if main and compressed:
        for section in main:
            _expect_unscaled(section)
        # A section without a base has the model's, as in transformers.
        bases = [{"rope_base": section.number("rope_theta", default=base)} for section in main]
        readings = [_compressed(config, section, base) for section in compressed]
        return _agreed(readings, ropes.origin) | _agreed(bases, ropes.origin)
    if main or compressed:
        raise BadInput(f"{ropes.origin} has {', '.join(ropes.keys())} alone, expected the sections main and compress")
    # Flat, it is the compressed layers' but for its base.
    ropes.get("rope_theta")
    flat = [_compressed(config, ropes, compressed_base) | {"compressed_rope_base": compressed_base}]
    if _FLAT_SECTION in config:
        flat.append(_compressed(config, config.section(_FLAT_SECTION), compressed_base))
    return _agreed(flat, ropes.origin) | {"rope_base": base}


def _compressed(config: Config, rope: Config, base: float) -> dict[str, Any]:
    return {
        "rotary_size": _rotary_size(config, rope),
        "compressed_rope_base": rope.number("rope_theta", default=base),
        **_yarn(config, rope),
    }


def _agreed(readings: list[dict[str, Any]], origin: str) -> dict[str, Any]:
    for reading in readings[1:]:
        for key in reading.keys() | readings[0].keys():
            if reading.get(key) != readings[0].get(key):
                raise BadInput(
                    f"{origin}: sections of one rotary embedding say {readings[0].get(key)!r} and {reading.get(key)!r} "
                    f"({key}): leave one of them out"
                )
    return readings[0]


def _expect_unscaled(rope: Config) -> None:
    rope.expect("rope_type", "default")
    rope.expect("type", "default")
    rope.get("partial_rotary_factor")  # that of compressed layers counts, there is one for both


def _rotary_size(config: Config, rope: Config) -> int:
    head_size, size = config.integer("head_dim"), config.integer("qk_rope_head_dim", default=0)
    partial = rope.number("partial_rotary_factor", default=config.number("partial_rotary_factor", default=0.0))
    if not partial and not size:
        raise BadInput(f"{config.origin}: qk_rope_head_dim or partial_rotary_factor is missing, expected a number")
    if partial and size and round(head_size * partial) != size:
        raise BadInput(
            f"{config.origin}: qk_rope_head_dim is {size}, but partial_rotary_factor {partial:g} of head_dim "
            f"{head_size} is {head_size * partial:g}: leave one of them out"
        )
    return size or round(head_size * partial)


def _yarn(config: Config, rope: Config) -> dict[str, Any]:
    kind = rope.text("rope_type", "type", default="default")
    if kind == "default":
        return {}
    if kind != "yarn":
        raise BadInput(f"{rope.origin}: rope type is {kind!r}, expected 'yarn' or 'default'")
    rope.expect("beta_fast", YARN_FAST)
    rope.expect("beta_slow", YARN_SLOW)
    rope.expect("attention_factor", 1.0)  # also where it is missing: V4 scales no scores
    rope.expect("truncate", True)
    context = config.integer("max_position_embeddings")
    return {
        "scaling": kind,
        "yarn_factor": rope.number("factor"),
        "yarn_context": rope.integer("original_max_position_embeddings", default=context),
    }
