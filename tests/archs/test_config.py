"""Access to configuration: nothing is assumed, and what nobody asked for is known."""

from __future__ import annotations

import pytest
from moecast.archs.config import Config
from moecast.errors import BadInput

VALUES = {
    "hidden_size": 64,
    "head_dim": 8,
    "attention_head_dim": 8,
    "torch_dtype": "bfloat16",
    "sliding_window": None,
    "rope": {"theta": 1e4, "type": "yarn", "inner": {"factor": 2, "new": 1}},
    "vision": {"layers": 3},
    "kinds": [1, 1],
}


def test_unread_names_what_nobody_asked_for() -> None:
    config = Config(VALUES, "config.json")
    assert set(config.unread()) == VALUES.keys() - {"sliding_window"}
    config.integer("hidden_size")
    config.integer("head_dim", "attention_head_dim")  # of two spellings both are known
    config.integers("kinds", 2)
    config.expect("sliding_window")
    rope = config.section("rope")
    rope.number("theta")
    config.section("rope").section("inner").integer("factor")
    assert set(config.unread()) == {"torch_dtype", "vision", "rope.type", "rope.inner.new"}
    config.get("vision")
    config.section("rope").expect("type", "yarn")
    assert set(config.unread()) == {"torch_dtype", "rope.inner.new"}


def test_asking_whether_a_key_is_there_is_not_reading_it() -> None:
    config = Config(VALUES, "config.json")
    assert "torch_dtype" in config
    assert "torch_dtype" in config.unread()


def test_zero_counts_where_it_is_the_default() -> None:
    config = Config({"groups": 0}, "config.json")
    assert config.integer("groups", default=0) == config.integer("missing", default=0) == 0
    for default in ({}, {"default": 1}):
        with pytest.raises(BadInput, match="groups is 0, expected a positive whole number"):
            config.integer("groups", **default)
