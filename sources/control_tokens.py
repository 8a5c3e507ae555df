"""The token texts that llama.cpp treats as control tokens, whatever the tokenizer files say.

Control tokens are never found in a user's text. Facts from llama.cpp: src/llama-vocab.cpp (the texts) and
conversion/base.py (the brackets).
"""

from __future__ import annotations

END_OF_GENERATION_TEXTS = frozenset(
    {
        "</s>",
        "<eos>",
        "[EOS]",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
    }
)
"""Texts that end generation in llama.cpp even when no id in the file says so."""

_FILL_IN_THE_MIDDLE_TEXTS = frozenset(
    f"{left}{name}{right}"
    for left, names, right in (
        ("<", ("fim-prefix", "fim-suffix", "fim-middle", "fim-pad", "fim-repo"), ">"),
        ("<", ("fim_prefix", "fim_suffix", "fim_middle", "fim_pad", "reponame"), ">"),
        ("<", ("PRE", "SUF", "MID", "PAD", "REPO"), ">"),
        ("▁<", ("PRE", "SUF", "MID"), ">"),
        ("[", ("PAD",), "]"),
    )
    for name in names
)
_CONTROL_TEXTS = END_OF_GENERATION_TEXTS | _FILL_IN_THE_MIDDLE_TEXTS | {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}
_CONTROL_BRACKETS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))


def looks_like_control(text: str) -> bool:
    """Whether an added token with this text is a control token even when its `special` flag is off."""
    return text in _CONTROL_TEXTS or any(
        text.startswith(opening) and text.endswith(closing) for opening, closing in _CONTROL_BRACKETS
    )
