"""How llama.cpp splits text before byte-pair merging: one table, read in both directions.

A GGUF file names its splitter in `tokenizer.ggml.pre`; tokenizer.json writes it out as regular expressions. The table
rebuilds a tokenizer from the name and finds the name from the expressions.

llama.cpp's expressions only approximate those of some tokenizers: it has no upper and lower case beyond ASCII and keeps
combining marks out of words. `splits` is what llama.cpp runs, because that is what a file's ids mean; `sources` holds
the spellings in tokenizer.json that llama.cpp's own converter gives this name to.
Facts from llama.cpp's src/llama-vocab.cpp and src/unicode.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ..errors import BadInput

# The parts that the expressions share. llama.cpp's engine has no inline flags, so it spells case out.
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CONTRACTION_SPELLED = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_NEWLINES_AND_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION = r"| ?[^\s\p{L}\p{N}]+"

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ANY_CASE = r"[\p{L}\p{M}]"
_UPPER_ASCII, _LOWER_ASCII = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"


def _llama3(contraction: str, digits: str) -> str:
    return contraction + "|" + _WORD + "|" + digits + _PUNCTUATION + r"[\r\n]*" + _NEWLINES_AND_SPACES


def _with_marks(contraction: str) -> str:
    """Words of Qwen3.5: combining marks are letters, but begin none."""
    words = r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    return contraction + words + _NEWLINES_AND_SPACES


def _cased(upper: str, lower: str, contraction: str, digits: str, ends: str = r"[\r\n/]*") -> str:
    """Words split where lower case turns to upper case, as GPT-4o and Tekken do; `ends` follow on punctuation."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = f"{lead}{upper}*{lower}+{contraction}|{lead}{upper}+{lower}*{contraction}|"
    return words + digits + _PUNCTUATION + ends + _NEWLINES_AND_SPACES


_GPT2_ENGINE = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_GPT2 = _GPT2_ENGINE + r"|\s+"
_LLAMA3_ENGINE = _llama3(_CONTRACTION_SPELLED, r"\p{N}{1,3}")
_LLAMA3 = _llama3(_CONTRACTION, r"\p{N}{1,3}")
_TEKKEN = _cased(_UPPER, _LOWER, "", r"\p{N}")
_NOT_HAN = r"&&[^\p{Han}]]"
_KIMI = r"[\p{Han}]+|" + _cased(
    _UPPER[:-1] + _NOT_HAN, _LOWER[:-1] + _NOT_HAN, _CONTRACTION + "?", r"\p{N}{1,3}", ends=r"[\r\n]*"
)
_HAN_ENGINE = (
    r"\x{3400}-\x{4DBF}\x{4E00}-\x{9FFF}\x{F900}-\x{FAFF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2EBEF}\x{2F800}-\x{2FA1F}"
)
_KIMI_ENGINE = (
    rf"[{_HAN_ENGINE}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN_ENGINE}]]+{_CONTRACTION_SPELLED}?"
    r"|\p{N}{1,3}" + _PUNCTUATION + r"[\r\n]*" + _NEWLINES_AND_SPACES
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    + _NEWLINES_AND_SPACES,
)


# Kinds of byte-pair vocabularies, in llama.cpp's words: of bytes, and of characters with a space as U+2581, what is no
# token being written in bytes.
BYTE_LEVEL, BYTE_FALLBACK = "gpt2", "gemma4"
SPACE = "\u2581"


@dataclass(frozen=True)
class PreTokenizer:
    """One splitter of llama.cpp under all its names, the usual one first."""

    names: tuple[str, ...]
    splits: tuple[str, ...]
    """The expressions llama.cpp applies one after another; a match is a piece, and so is the text between matches."""
    sources: tuple[tuple[str, ...], ...] = ()
    """Spellings of this splitter in tokenizer.json, each a sequence of expressions."""
    ignore_merges: bool = False
    """A piece that is a token as a whole is taken without merging."""
    add_bos: bool = False
    """Whether text begins with BOS when the file has no `tokenizer.ggml.add_bos_token`."""
    model: str = BYTE_LEVEL
    """What kind of vocabulary it is for, as `tokenizer.ggml.model` says it."""


PRE_TOKENIZERS: tuple[PreTokenizer, ...] = (
    PreTokenizer(
        names=("gpt-4o", "minimax-m2", "llama4", "kanana2"),
        splits=(_cased(_UPPER_ASCII, _LOWER_ASCII, _CONTRACTION_SPELLED + "?", r"\p{N}{1,3}"),),
        sources=((_cased(_UPPER, _LOWER, _CONTRACTION + "?", r"\p{N}{1,3}"),),),
    ),
    PreTokenizer(
        names=("tekken",),
        splits=(_cased(_UPPER_ASCII, _LOWER_ASCII, "", r"\p{N}"),),
        sources=((_TEKKEN,),),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(
        names=("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "midm-2.0", "lfm2"),
        splits=(_LLAMA3_ENGINE,),
        sources=((_LLAMA3,),),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(
        # The tokenizers that carry this name split like Tekken; llama.cpp runs the Llama 3 expression on them.
        names=("pixtral",),
        splits=(_LLAMA3_ENGINE,),
        sources=((_TEKKEN,), (_LLAMA3,)),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(names=("glm4",), splits=(_LLAMA3_ENGINE,), sources=((_LLAMA3,),), ignore_merges=True),
    # llama.cpp finds no words within words by their case, and takes Han letters by blocks.
    PreTokenizer(names=("kimi-k2",), splits=(_KIMI_ENGINE,), sources=((_KIMI,),)),
    PreTokenizer(names=("deepseek-v3", "joyai-llm", "hunyuan-dense"), splits=_DEEPSEEK_V3, sources=(_DEEPSEEK_V3,)),
    PreTokenizer(
        names=("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open"),
        splits=(_llama3(_CONTRACTION_SPELLED, r"\p{N}"),),
        sources=((_llama3(_CONTRACTION, r"\p{N}"),),),
    ),
    PreTokenizer(
        names=("command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"),
        splits=(r"\p{N}", _GPT2_ENGINE),
        sources=((r"\p{N}", _GPT2),),
    ),
    PreTokenizer(
        # Digits by threes from the right, then words as GPT-4o has them. llama.cpp leaves what precedes digits with the
        # first of them until words are found, and takes letters of any case for both.
        names=("cohere2moe", "tiny_aya"),
        splits=(
            r"[^\p{N}]*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
            _cased(_ANY_CASE, _ANY_CASE, _CONTRACTION_SPELLED + "?", r"\p{N}{1,3}"),
        ),
        sources=((r"\d{1,3}(?=(?:\d{3})*\b)", _cased(_UPPER, _LOWER, _CONTRACTION + "?", r"\p{N}{1,3}")),),
    ),
    PreTokenizer(
        names=("qwen35",), splits=(_with_marks(_CONTRACTION_SPELLED),), sources=((_with_marks(_CONTRACTION),),)
    ),
    PreTokenizer(
        names=("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "modern-bert", "exaone4"),
        splits=(_GPT2_ENGINE,),
        sources=((_GPT2,),),
    ),
    PreTokenizer(names=("gemma4",), splits=(r"[^\n]+|\n+",), add_bos=True, model=BYTE_FALLBACK),
    PreTokenizer(names=("default",), splits=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2_ENGINE, r"\p{N}+", "[0-9][0-9][0-9]")),
)


OTHER_NAMES = (
    *("afmoe", "a.x-4.0", "bailingmoe", "bailingmoe2", "bloom", "chameleon", "chatglm-bpe", "dbrx"),
    *("deepseek-coder", "deepseek-llm", "exaone-moe", "f2llmv2", "falcon", "glm5"),
    *("gpt3-finnish", "granite-docling", "granite-embed-multi-311m", "granite-embed-multi-97m", "grok-2", "jais-2"),
    *("jina-de", "jina-es", "jina-v1-en", "jina-v2-code", "jina-v2-de", "jina-v2-es", "jina-v5-nano"),
    *("kormo", "laguna", "llada-moe", "minicpm5", "mmbert", "poro-chat", "refact"),
    *("roberta-bpe", "sarvam-moe", "seed-coder", "smaug-bpe", "starcoder", "superbpe"),
    *("trillion", "ufakzeka", "viking", "youtu"),
)
"""Names that llama.cpp knows too, of splitters that the table lacks: what they do to a text cannot be checked."""


def find_pre_tokenizer(name: str) -> PreTokenizer | None:
    """The row that carries this `tokenizer.ggml.pre` name, or None."""
    return next((row for row in PRE_TOKENIZERS if name in row.names), None)


def splitter_of_code(module: str) -> tuple[str, ...] | None:
    """The expressions of a tokenizer whose files leave them to a module of Python; None for an unknown one."""
    return {"tokenization_kimi": (_KIMI,)}.get(module)


def check_known(name: str) -> None:
    """Raises BadInput with the nearest names for one that llama.cpp would refuse to load."""
    known = [*(name for row in PRE_TOKENIZERS for name in row.names), *OTHER_NAMES]
    if name not in known:
        close = get_close_matches(name, known) or [row.names[0] for row in PRE_TOKENIZERS]
        raise BadInput(f"--pre is {name!r}, which llama.cpp does not know: did you mean {' or '.join(close)}?")


def spelled_alike(tokenizer_json: Mapping[str, Any]) -> list[PreTokenizer]:
    """The rows that have the splitter of tokenizer.json (parsed), and its merge rule where one of them has it."""
    splitter = splitter_of(tokenizer_json)
    ignore_merges = bool(tokenizer_json["model"].get("ignore_merges", False))
    rows = [row for row in PRE_TOKENIZERS if splitter in row.sources]
    return [row for row in rows if row.ignore_merges == ignore_merges] or rows


def model_of(tokenizer_json: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of the kind of vocabulary that tokenizer.json (parsed) has; None for what it has no name for."""
    if tokenizer_json["model"]["type"] != "BPE":
        return None
    if any(step["type"] == "ByteLevel" for step in pre_tokenizer_steps(tokenizer_json)):
        return BYTE_LEVEL
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    spaced = tokenizer_json.get("normalizer") == replaced
    return BYTE_FALLBACK if spaced and tokenizer_json["model"].get("byte_fallback") else None


def splitter_of(tokenizer_json: Mapping[str, Any]) -> tuple[str, ...]:
    """The splitting expressions of tokenizer.json (parsed) in order; a step without one gives its name."""
    steps = [_expression(step) for step in pre_tokenizer_steps(tokenizer_json)]
    return tuple(expression for expression in steps if expression)


def pre_tokenizer_steps(tokenizer_json: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The pre-tokenizer of tokenizer.json (parsed) as a flat list of its steps."""
    pending, steps = [tokenizer_json.get("pre_tokenizer")], []
    while pending:
        step = pending.pop(0)
        if step and step["type"] == "Sequence":
            pending = [*step["pretokenizers"], *pending]
        elif step:
            steps.append(step)
    return steps


def _expression(step: Mapping[str, Any]) -> str:
    if step["type"] == "ByteLevel":
        return _GPT2 if step.get("use_regex", True) else ""
    if step["type"] == "Digits" and step.get("individual_digits"):
        return r"\p{N}"
    # "Removed" and inverted keeps the matches: the same pieces, as the table's expressions match every character.
    kept = (step.get("behavior"), step.get("invert")) in {("Isolated", False), ("Removed", True)}
    if step["type"] == "Split" and kept and "Regex" in step["pattern"]:
        return str(step["pattern"]["Regex"]).replace("\r", r"\r").replace("\n", r"\n")
    return f"<{step['type']}>"
