"""The `tokenizer.*` keys of a GGUF file, and the proof that they give the ids of the tokenizer they came from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import tokenizers

from ...archs.pretokenizers import choose_pre, pre_tokenizer_steps
from ...errors import BadInput
from ...progress import Progress
from ...sources.chat_templates import DEFAULT
from ...sources.control_tokens import END_OF_GENERATION_TEXTS
from ...sources.tokenizer import Tokenizer
from ...sources.tokenizer_gguf import (
    CHAT_TEMPLATE,
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    build_backend,
    read_tokenizer_metadata,
)

PROBE = {
    "English": "It's the cat's; we'll say I'm THERE, you've gone, they'RE late, he'd DON'T 'twas rock'n'roll.",
    "digits": "7 42 365 1234 56789 1000000 3.14159 1,234,567.89 0x7fFf 10⁻³ ½ Ⅷ ١٢٣ २०२४",
    "spaces": "a  b   c    d\te\t\tf \t g\u00a0h\u3000i      \n   j   ",
    "newlines": "one\ntwo\n\nthree\r\nfour\n \n\n  five\n\n\n\n\tsix\n",
    "code": "def f(x):\n    return x**2  # ok\n\n}\n// next\nif (a[i]!=b->c && !d){ HTTPServer.getURL('/x') }\n",
    "punctuation": '!!! ... ?! -- === <<>> #### $$ %^&*() [x](y) {"k": null} “quoted” — ‘so’ … @user_name ~/a\\b',
    "Latin": "Über naïve façade São Ærø Łódź Çağrı ÉCOLE encyclopædia ßtraße aßB McDonald iPhone",
    "combining marks": "e\u0301cole n\u0303 A\u030angstro\u0308m",
    "Cyrillic and Greek": "Привет, МИР! ПриветМир Київ Ελληνικά ΑΒΓαβγ ὀξύς",
    "Chinese": "你好，世界。2024年我们在北京买了3个苹果apple！",
    "Japanese": "こんにちは世界、カタカナ・テスト123です。",
    "Korean": "안녕하세요 세계! 한국어 테스트 3번",
    "Arabic and Hebrew": "مرحبا بالعالم، السَّلامُ ١٢٣ שלום עולם בְּרֵאשִׁית",
    "Hindi": "नमस्ते दुनिया, यह हिन्दी में एक वाक्य है।",
    "Thai": "สวัสดีชาวโลก นี่คือภาษาไทย",
    "emoji": "🙂🚀 👩‍👩‍👧‍👦 ✅❤️ 🇩🇪 👍🏽!",
}
"""Texts by what they try; between them the ways in which splitters differ."""

_SHOWN_IDS = 8


@dataclass(frozen=True)
class SelfCheck:
    """What differs between the source tokenizer and the file: one line each, None when nothing does.

    `error`: even split as the source splits, the file's vocabulary gives other ids; such a file must not be written.
    `warning`: the vocabulary is right, but llama.cpp will split some text in another way than the source.
    """

    error: str | None
    warning: str | None


def tokenizer_metadata(
    tokenizer: Tokenizer, vocabulary_size: int, pre: str | None, architecture_pre: str | None, progress: Progress
) -> dict[str, Any]:
    """Every `tokenizer.*` key for a file, checked.

    Args:
        tokenizer: the source's tokenizer, byte-level BPE.
        vocabulary_size: rows of the embedding, the length of the token list.
        pre: llama.cpp's name of the text splitter where the user insists on one.
        architecture_pre: the name that the architecture gives.
        progress: receives what llama.cpp will do differently, as notes.

    Raises BadInput when the tokenizer cannot be written to GGUF, or when the keys do not reproduce its ids.
    """
    try:
        name, contradiction = choose_pre(pre, architecture_pre, json.loads(tokenizer.backend.to_str()))
        metadata = vocabulary_metadata(tokenizer, vocabulary_size, name)
        check = self_check(tokenizer, metadata)
        if check.error:
            raise BadInput(check.error)
    except BadInput as error:
        raise BadInput(f"{tokenizer.origin}: {error}") from None
    for line in (contradiction, check.warning, *tokenizer.losses, *_losses(tokenizer, metadata)):
        if line:
            progress.note(line)
    return metadata


def _losses(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> list[str]:
    """What an engine will not find in the file, a line each."""
    losses, others = [], [*tokenizer.chat_templates]
    if CHAT_TEMPLATE not in metadata:
        what = f"no default chat template, only {', '.join(others)}" if others else "no chat template"
        losses.append(f"the checkpoint has {what}: llama.cpp will use one of its own")
    kept = {metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    tokens = metadata["tokenizer.ggml.tokens"]
    if lost := [id for id in _unknown_ends(tokenizer, tokens) if id not in kept]:
        names = ", ".join(repr(tokens[id]) for id in lost)
        losses.append(f"{names} will not end a text: GGUF has room for three ids that do")
    return losses


def vocabulary_metadata(tokenizer: Tokenizer, vocabulary_size: int, pre: str) -> dict[str, Any]:
    """The `tokenizer.*` keys as Python values: int is u32, bool is bool, list[int] is an i32 array, list[str] strings.

    A source with more than two ids that end generation beside EOS and those llama.cpp knows by their text loses the
    rest: the format has room for two (`eot`, `eom`). Raises BadInput when GGUF cannot hold this tokenizer.
    """
    source = json.loads(tokenizer.backend.to_str())
    _require_byte_level(source)
    if tokenizer.vocabulary_size > vocabulary_size:
        raise BadInput(
            f"the tokenizer has ids up to {tokenizer.vocabulary_size - 1}, but the embedding has only "
            f"{vocabulary_size} rows; the tokenizer files belong to another model"
        )
    if tokenizer.eos is None:
        raise BadInput(
            "the tokenizer files name no end-of-text token and llama.cpp would take token 11; "
            "set eos_token in tokenizer_config.json"
        )
    tokens, types = _token_list(tokenizer.backend, vocabulary_size)
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "unknown": tokenizer.unknown, "padding": tokenizer.padding}
    ids |= dict(zip(("eot", "eom"), _unknown_ends(tokenizer, tokens), strict=False))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": _merges(source["model"]["merges"]),
        **{f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items() if id is not None},
        "tokenizer.ggml.add_bos_token": tokenizer.add_bos,
        "tokenizer.ggml.add_eos_token": False,
        **_chat_template_keys(tokenizer.chat_templates),
    }


def _unknown_ends(tokenizer: Tokenizer, tokens: Sequence[str]) -> list[int]:
    """Ids beside EOS that end generation and that llama.cpp does not know by their text."""
    further = sorted(tokenizer.end_of_generation - {tokenizer.eos})
    return [id for id in further if tokens[id] not in END_OF_GENERATION_TEXTS]


def self_check(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> SelfCheck:
    """Compare the ids of the probe texts from the source tokenizer, from the metadata split as the source splits, and
    from the metadata split as llama.cpp splits."""
    pre = metadata["tokenizer.ggml.pre"]
    source_model = tokenizer.backend.model
    assert isinstance(source_model, tokenizers.models.BPE)
    same_split = build_backend(metadata, tokenizer.backend.pre_tokenizer, source_model.ignore_merges)
    same_split.normalizer = tokenizer.backend.normalizer
    error = _difference(tokenizer.backend, same_split, PROBE)
    if error:
        return SelfCheck(f"the GGUF tokenizer would give other ids than tokenizer.json: {error}", None)
    try:
        engine = read_tokenizer_metadata(metadata).backend
    except BadInput as unknown:
        return SelfCheck(None, f"the split of llama.cpp's '{pre}' cannot be checked: {unknown}")
    added = tokenizer.backend.get_added_tokens_decoder().values()
    marks = {f"token {token.content}": f"a {token.content} b{token.content}c" for token in added if not token.special}
    warning = _difference(tokenizer.backend, engine, PROBE | marks)
    line = f"llama.cpp's '{pre}' will split some text in another way than tokenizer.json: {warning}"
    return SelfCheck(None, line if warning else None)


def _difference(source: tokenizers.Tokenizer, other: tokenizers.Tokenizer, probe: Mapping[str, str]) -> str | None:
    """Which probe texts differ, and the first place where the first one does."""
    source.encode_special_tokens = other.encode_special_tokens = True
    different, first = [], ""
    for name, text in probe.items():
        expected = source.encode(text, add_special_tokens=False)
        found = other.encode(text, add_special_tokens=False).ids
        if expected.ids != found:
            different.append(name)
            first = first or _place(text, expected.ids, expected.offsets, found)
    if not different:
        return None
    return f"{', '.join(different)} ({len(different)} of {len(probe)} probe texts), first {first}"


def _place(text: str, expected: Sequence[int], offsets: Sequence[tuple[int, int]], found: Sequence[int]) -> str:
    index = next(i for i, (left, right) in enumerate(zip_longest(expected, found)) if left != right)
    position = offsets[index][0] if index < len(offsets) else len(text)
    part = slice(index, index + _SHOWN_IDS)
    return f"at character {position} {text[position : position + 16]!r}: {expected[part]} there, {found[part]} here"


def _require_byte_level(source: Mapping[str, Any]) -> None:
    model = source["model"]
    if model["type"] != "BPE":
        raise BadInput(f"tokenizer.json holds a {model['type']} model; only byte-level BPE can be written to GGUF")
    if not any(step["type"] == "ByteLevel" for step in pre_tokenizer_steps(source)):
        raise BadInput("tokenizer.json has no ByteLevel pre-tokenizer; only byte-level BPE can be written to GGUF")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise BadInput(f"tokenizer.json sets {key} to {model[key]!r}, which llama.cpp does not know")


def _token_list(backend: tokenizers.Tokenizer, size: int) -> tuple[list[str], list[int]]:
    """Texts and types by id. Added tokens are written as they read, the others in byte-level letters."""
    texts: dict[int, str] = {}
    for text, id in backend.get_vocab(with_added_tokens=False).items():
        if texts.setdefault(id, text) != text:
            raise BadInput(f"tokenizer.json gives id {id} to both {texts[id]!r} and {text!r}; each needs its own")
    added = backend.get_added_tokens_decoder()
    texts |= {id: token.content for id, token in added.items()}
    taken = set(texts.values())
    tokens, types = [], []
    for id in range(size):
        tokens.append(texts[id] if id in texts else _filler(id, taken))
        if id in added:
            types.append(CONTROL if added[id].special else USER_DEFINED)
        else:
            types.append(NORMAL if id in texts else UNUSED)
    return tokens, types


def _filler(id: int, taken: set[str]) -> str:
    """A text for an id without one: llama.cpp ends the process when two tokens share a text."""
    text = f"[PAD{id}]"
    while text in taken:
        text = f"[{text}]"
    return text


def _merges(merges: Sequence[Sequence[str]]) -> list[str]:
    # Byte-level letters write a space as U+0120, so a merge with a plain space never happens; GGUF cannot write it.
    return [f"{left} {right}" for left, right in merges if " " not in left + right]


def _chat_template_keys(templates: Mapping[str, str]) -> dict[str, Any]:
    """As gguf-py writes them: in names, everything but letters and digits of ASCII becomes "_"."""
    named: dict[str, str] = {}
    for name, text in templates.items():
        key = re.sub(r"[^A-Za-z0-9]", "_", name)
        if named.setdefault(key, text) != text:
            raise BadInput(f"two chat templates would both be called {key!r} in the file: rename {name!r}")
    keys: dict[str, Any] = {CHAT_TEMPLATE: named.pop(DEFAULT)} if DEFAULT in named else {}
    if named:
        keys["tokenizer.chat_templates"] = list(named)
    return keys | {f"{CHAT_TEMPLATE}.{name}": text for name, text in named.items()}
