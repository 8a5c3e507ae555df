"""YaRN as DeepSeek has it, which also scales the scores of attention: in config.json, and as llama.cpp is told of it.

With f the factor and g(s) = 0.1 s ln(f) + 1, what is rotated is multiplied by g(mscale) / g(mscale_all_dim), and
queries and keys as a whole by g(mscale_all_dim) each. llama.cpp takes mscale for mscale_all_dim, multiplies what is
rotated by `attn_factor`, and everything by that and by g(10 yarn_log_multiplier); without a multiplier by g(1) instead.
So the two keys say any pair of factors. It reads no limits of the ramp from a file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import BadInput
from .config import Config
from .graph import Yarn
from .shared import YARN_FAST, YARN_SLOW

_SCALING = "rope.scaling"


@dataclass(frozen=True)
class MscaledYarn:
    """YaRN, and what it multiplies queries and keys by as a whole, each of them."""

    yarn: Yarn
    in_scores: float


def read_mscaled_yarn(rope: Config) -> MscaledYarn | None:
    """What a section of rotary settings asks for. Raises BadInput for any other scaling than YaRN."""
    kind = rope.text("rope_type", "type", default="default")
    if kind == "default":
        return None
    if kind != "yarn":
        raise BadInput(f"{rope.origin}: rope type is {kind!r}, expected 'yarn' or 'default'")
    factor, scale = rope.number("factor"), rope.number("mscale_all_dim", default=0.0)
    _check_factor(factor, f"{rope.origin}: factor")
    rotated = rope.number("mscale", default=0.0)
    usual = _growth(factor, rotated) / _growth(factor, scale) if rotated and scale else _growth(factor)
    magnitude = rope.number("attention_factor", default=usual)
    rope.expect("truncate", True)
    fast, slow = rope.number("beta_fast", default=YARN_FAST), rope.number("beta_slow", default=YARN_SLOW)
    yarn = Yarn(factor, rope.integer("original_max_position_embeddings"), fast, slow, magnitude)
    return MscaledYarn(yarn, _growth(factor, scale))


def yarn_from_gguf(metadata: Config, name: str) -> MscaledYarn | None:
    """The same as the keys of a GGUF file of that architecture say it, with the limits that they name."""
    prefix = f"{name}.{_SCALING}"
    kind = metadata.text(f"{prefix}.type", default="none")
    if kind == "none":
        return None
    metadata.expect(f"{prefix}.type", "yarn")
    factor, attention = metadata.number(f"{prefix}.factor"), metadata.number(f"{prefix}.attn_factor", default=1.0)
    _check_factor(factor, f"{metadata.origin}: {prefix}.factor")
    multiplier = _multiplier(metadata, f"{prefix}.yarn_log_multiplier")
    magnitude = attention if multiplier else attention * _growth(factor)
    fast = metadata.number(f"{prefix}.yarn_beta_fast", default=YARN_FAST)
    slow = metadata.number(f"{prefix}.yarn_beta_slow", default=YARN_SLOW)
    context = metadata.integer(f"{prefix}.original_context_length")
    return MscaledYarn(
        Yarn(factor, context, fast, slow, magnitude), magnitude * _growth(factor, 10 * (multiplier or 0.0))
    )


def log_multiplier(found: MscaledYarn) -> float | None:
    """`yarn_log_multiplier`; None where scores are multiplied by no more than what is rotated."""
    ratio = found.in_scores / found.yarn.magnitude
    return None if _is_one(ratio) else (ratio - 1) / math.log(found.yarn.factor)


def attention_factor(found: MscaledYarn) -> float | None:
    """`attn_factor`; None where it is 1."""
    magnitude = found.yarn.magnitude
    factor = magnitude if log_multiplier(found) else magnitude / _growth(found.yarn.factor)
    return None if _is_one(factor) else factor


def _is_one(factor: float) -> bool:
    """To the digits that a file holds."""
    return math.isclose(factor, 1.0, rel_tol=2**-23)


def _growth(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1


def _check_factor(factor: float, what: str) -> None:
    if factor <= 1:
        raise BadInput(f"{what} is {factor:g}, expected more than 1")


def _multiplier(metadata: Config, key: str) -> float | None:
    """Which may be negative."""
    value = metadata.get(key)
    if value is not None and not (isinstance(value, float | int) and math.isfinite(value)):
        raise BadInput(f"{metadata.origin}: {key} is {value!r}, expected a number")
    return value or None
