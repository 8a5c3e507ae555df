"""Whether two tokenizers give a text the same ids: on texts that show how splitters differ, and on any other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from ...sources.tokenizer import Tokenizer

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
class Difference:
    """What differs between two tokenizers on some texts.

    Attributes:
        texts, tokens: share of the texts, and of their tokens, that differ.
        first: which texts differ, and the first place where the first one does; None where none does.
    """

    texts: float
    tokens: float
    first: str | None


@dataclass(frozen=True)
class Tokenization:
    """How far the ids that a candidate gives are from its reference's.

    Attributes:
        probe_texts, probe_tokens: share of the probe texts, and of their tokens, that differ.
        evaluation_tokens: share of the evaluation text's tokens that differ.
        first: the first difference; None where there is none.
    """

    probe_texts: float
    probe_tokens: float
    evaluation_tokens: float
    first: str | None

    def __str__(self) -> str:
        if self.first is None:
            return "none"
        return f"{self.probe_texts:.1%} of probe texts, {self.evaluation_tokens:.2%} of the evaluation text"


def compare_tokenizers(reference: Tokenizer, candidate: Tokenizer, text: str) -> Tokenization:
    """The ids of the probe texts, and of the text that the models are evaluated on."""
    probes = compare_texts(reference, candidate, probes_of(reference))
    evaluation = compare_texts(reference, candidate, {"the evaluation text": text})
    return Tokenization(probes.texts, probes.tokens, evaluation.tokens, evaluation.first or probes.first)


def probes_of(tokenizer: Tokenizer) -> dict[str, str]:
    """The probe texts, and one for each token that users may write."""
    added = tokenizer.backend.get_added_tokens_decoder().values()
    marks = {f"token {token.content}": f"a {token.content} b{token.content}c" for token in added if not token.special}
    return PROBE | marks


def compare_texts(reference: Tokenizer, candidate: Tokenizer, texts: Mapping[str, str]) -> Difference:
    """What differs on texts, by name."""
    different, first, tokens, differing = [], "", 0, 0
    for name, text in texts.items():
        expected, found = (_pieces(tokenizer, text) for tokenizer in (reference, candidate))
        tokens += len(expected)
        if [id for id, _ in expected] != [id for id, _ in found]:
            different.append(name)
            differing += max((Counter(expected) - Counter(found)).total(), 1)
            first = first or _place(text, expected, found)
    line = f"{', '.join(different)} ({len(different)} of {len(texts)} texts), first {first}"
    return Difference(len(different) / len(texts), differing / max(tokens, 1), line if different else None)


_Piece = tuple[int, tuple[int, int]]


def _pieces(tokenizer: Tokenizer, text: str) -> list[_Piece]:
    """The ids and which characters each stands for, BOS in front where the model wants it."""
    tokenizer.backend.encode_special_tokens = True
    encoded = tokenizer.backend.encode(text, add_special_tokens=False)
    pieces = list(zip(encoded.ids, encoded.offsets, strict=True))
    return [(tokenizer.bos, (0, 0)), *pieces] if tokenizer.add_bos and tokenizer.bos is not None else pieces


def _place(text: str, expected: Sequence[_Piece], found: Sequence[_Piece]) -> str:
    index = next(i for i, (left, right) in enumerate(zip_longest(expected, found)) if left != right)
    position = expected[index][1][0] if index < len(expected) else len(text)
    left, right = ([id for id, _ in pieces[index : index + _SHOWN_IDS]] for pieces in (expected, found))
    return f"at character {position} {text[position : position + 16]!r}: {left} there, {right} here"
