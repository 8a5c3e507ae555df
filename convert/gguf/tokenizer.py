"""The `tokenizer.*` keys of a GGUF file, and the proof that they give the ids of the tokenizer they came from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import tokenizers

from ...archs.pretokenizers import (
    PRE_TOKENIZERS,
    SPACE,
    check_known,
    find_pre_tokenizer,
    model_of,
    spelled_alike,
)
from ...errors import BadInput
from ...progress import Progress
from ...runner.measure.tokenization import PROBE, compare_texts, probes_of
from ...sources.chat_templates import DEFAULT
from ...sources.control_tokens import END_OF_GENERATION_TEXTS
from ...sources.tokenizer import Tokenizer
from ...sources.tokenizer_gguf import (
    BYTE,
    BYTE_TOKEN,
    CHAT_TEMPLATE,
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    build_backend,
    read_tokenizer_metadata,
)


def tokenizer_metadata(
    tokenizer: Tokenizer, vocabulary_size: int, pre: str | None, architecture_pre: str, progress: Progress
) -> dict[str, Any]:
    """Every `tokenizer.*` key for a file, checked.

    Args:
        tokenizer: the source's tokenizer, BPE of bytes or with bytes to fall back to.
        vocabulary_size: rows of the embedding, the length of the token list.
        pre: llama.cpp's name of the text splitter where the user insists on one.
        architecture_pre: the name that the architecture gives; another is taken where only that splits as the
            tokenizer does.
        progress: receives a note where it is not the architecture's.

    Raises BadInput when the tokenizer cannot be written to GGUF, when the keys do not reproduce its ids, and when
    llama.cpp has no splitter that gives them.
    """
    if pre:
        check_known(pre)
    try:
        metadata = vocabulary_metadata(tokenizer, vocabulary_size, pre or architecture_pre)
        if difference := vocabulary_error(tokenizer, metadata):
            raise BadInput(difference)
        name = pre or _choose_splitter(tokenizer, metadata, architecture_pre)
    except BadInput as error:
        raise BadInput(f"{tokenizer.origin}: {error}") from None
    if not pre and name != architecture_pre:
        progress.note(f"tokenizer.json splits text as llama.cpp's '{name}' does, not as '{architecture_pre}'")
    return metadata | {"tokenizer.ggml.pre": name}


def _choose_splitter(tokenizer: Tokenizer, metadata: Mapping[str, Any], usual: str) -> str:
    """The name of the splitter whose ids are nearest to the tokenizer's, the usual one where it is as near as any.

    Rows that spell the splitter as tokenizer.json does are its own, whatever llama.cpp's engine makes of them; where
    there is none, another row has to give every id of the probe texts.
    """
    own = spelled_alike(tokenizer.definition)
    usual_row = find_pre_tokenizer(usual)
    rows = own or [row for row in PRE_TOKENIZERS if row.model == metadata["tokenizer.ggml.model"]]
    names = [usual if row is usual_row else row.names[0] for row in rows]
    names.sort(key=lambda name: name != usual)
    if len(names) == 1:
        return names[0]
    differing: dict[str, float] = {}
    for name in names:
        differing[name] = _share_of_tokens(tokenizer, {**metadata, "tokenizer.ggml.pre": name})
        if not differing[name]:
            break
    best = min(differing, key=differing.__getitem__)
    if differing[best] and not own:
        raise BadInput(
            f"tokenizer.json splits text as no splitter of llama.cpp does: '{best}' is the nearest and gives "
            f"{differing[best]:.1%} of the tokens of the probe texts other ids; accept one with --pre"
        )
    return best


def _share_of_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> float:
    return compare_texts(tokenizer, read_tokenizer_metadata(metadata), PROBE).tokens


def written_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer that llama.cpp makes of a file's keys; None where moecast has no such splitter."""
    known = find_pre_tokenizer(metadata["tokenizer.ggml.pre"])
    return read_tokenizer_metadata(metadata) if known else None


def tokenizer_problems(tokenizer: Tokenizer, metadata: Mapping[str, Any], written: Tokenizer | None) -> tuple[str, ...]:
    """What a file will not do as its source does, a line each.

    Args:
        metadata, written: the file's keys, which `tokenizer_metadata` gave, and its `written_tokenizer`.
    """
    splitting = _splitting_problem(tokenizer, metadata["tokenizer.ggml.pre"], written)
    return (*([splitting] if splitting else []), *tokenizer.losses, *_losses(tokenizer, metadata))


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
    source = tokenizer.definition
    model = _model_of(source)
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
        "tokenizer.ggml.model": model,
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


def vocabulary_error(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> str | None:
    """Where the metadata gives other ids than the tokenizer even when text is split as that splits it; such a file
    must not be written."""
    source_model = tokenizer.backend.model
    assert isinstance(source_model, tokenizers.models.BPE)
    same_split = build_backend(metadata, tokenizer.backend.pre_tokenizer, source_model.ignore_merges)
    same_split.normalizer = tokenizer.backend.normalizer
    found = compare_texts(tokenizer, replace(tokenizer, backend=same_split), PROBE)
    return f"the GGUF tokenizer would give other ids than tokenizer.json: {found.first}" if found.first else None


def _splitting_problem(tokenizer: Tokenizer, pre: str, written: Tokenizer | None) -> str | None:
    """What llama.cpp will split in another way than the source."""
    if written is None:
        return f"what llama.cpp's '{pre}' does to a text cannot be checked: moecast has no such splitter"
    found = compare_texts(tokenizer, written, probes_of(tokenizer))
    if found.first is None:
        return None
    own = [row.names[0] for row in spelled_alike(tokenizer.definition) if pre not in row.names]
    remedy = f" ('{own[0]}' would be its own)" if own else ""
    return f"llama.cpp's '{pre}'{remedy} will split some text in another way than tokenizer.json: {found.first}"


def _model_of(source: Mapping[str, Any]) -> str:
    model = source["model"]
    kind = model_of(source)
    if model["type"] != "BPE":
        raise BadInput(
            f"tokenizer.json holds a {model['type']} model; only byte-level BPE, or BPE that falls back to bytes, can "
            "be written to GGUF"
        )
    if kind is None:
        raise BadInput(
            "tokenizer.json has no ByteLevel pre-tokenizer, nor byte_fallback and spaces replaced by U+2581; only such "
            "BPE can be written to GGUF"
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise BadInput(f"tokenizer.json sets {key} to {model[key]!r}, which llama.cpp does not know")
    return kind


def _token_list(backend: tokenizers.Tokenizer, size: int) -> tuple[list[str], list[int]]:
    """Texts and types by id. Added tokens are written as they read, the others in byte-level letters, if they are."""
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
        types.append(_type(tokens[-1], added.get(id)) if id in texts else UNUSED)
    return tokens, types


def _type(text: str, added: tokenizers.AddedToken | None) -> int:
    """Where a space is a letter, runs of them are added tokens too; as such they would not be written as spaces."""
    if added and (added.special or SPACE not in text):
        return CONTROL if added.special else USER_DEFINED
    return BYTE if BYTE_TOKEN.fullmatch(text) else NORMAL


def _filler(id: int, taken: set[str]) -> str:
    """A text for an id without one: llama.cpp ends the process when two tokens share a text."""
    text = f"[PAD{id}]"
    while text in taken:
        text = f"[{text}]"
    return text


def _merges(merges: Sequence[str]) -> list[str]:
    # Byte-level letters write a space as U+0120, so a merge with a plain space never happens; GGUF cannot write it.
    return [merge for merge in merges if merge.count(" ") == 1]


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
