"""llama.cpp's own drafts as an oracle: what multi-token prediction says after texts, from the model's hidden states.

    first, second = run_isolated("model.gguf", "model-mtp.gguf", [tokens, others], most=3)

The pairs of a hidden state and the token after it are read in one batch, then each drafted token in one of its own.
"""

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_float, c_int8, c_int32, c_void_p, cast
from typing import Any, NamedTuple

import numpy as np
from llama_library import Batch, context_parameters, failure, load_library, model_parameters
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
_DRAFTING = 1  # llama_context_type


class Drafted(NamedTuple):
    """Of n tokens: logits of the model [n, vocabulary] and of drafts that begin with each of the pairs [n - 1,
    vocabulary], and the tokens of the last pair's draft, [most], with the logits that they are the best of."""

    model: FloatArray
    pairs: FloatArray
    steps: FloatArray
    tokens: NDArray[np.int64]


def run_isolated(
    path: os.PathLike[str], draft: os.PathLike[str], texts: Sequence[Sequence[int]], most: int
) -> list[Drafted]:
    """What follows each of some texts, in a process of its own, which may crash."""
    request = json.dumps([os.fspath(path), os.fspath(draft), [[*map(int, text)] for text in texts], most])
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    result = subprocess.run([sys.executable, __file__], input=request.encode(), capture_output=True, env=environment)
    assert result.returncode == 0, result.stderr.decode(errors="replace")[-2000:]
    with np.load(io.BytesIO(result.stdout)) as found:
        return [
            Drafted(**{name: found[f"{number} {name}"] for name in Drafted._fields}) for number in range(len(texts))
        ]


class _Context:
    """A file with a cache in float32; `kind` is llama.cpp's type of context."""

    def __init__(self, path: str, tokens: int, kind: int) -> None:
        self._library = load_library()
        parameters = model_parameters(n_gpu_layers=0, use_extra_bufts=False, load_mtp=True)
        model = self._library.llama_model_load_from_file(os.fsencode(path), parameters)
        if model is None:
            raise failure(f"llama.cpp cannot load {path}")
        self._vocabulary = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(model))
        self.width = _function("llama_model_n_embd_out", c_int32, c_void_p)(model)
        sizes = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), tokens)
        plain = {"type_k": 0, "type_v": 0, "flash_attn_type": 0, "offload_kqv": False, "op_offload": False}
        settings = context_parameters(**sizes, **plain, n_threads=1, n_threads_batch=1, ctx_type=kind)
        self._handle = self._library.llama_init_from_model(model, settings)
        if self._handle is None:
            raise failure(f"llama.cpp cannot make a context for {path}")
        _function("_Z26llama_set_embeddings_nextnP13llama_contextbb", None, c_void_p, c_bool, c_bool)(
            self._handle, True, False
        )

    def clear(self) -> None:
        """Forget all tokens."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._handle), True)

    def decode(self, tokens: Sequence[int], hidden: FloatArray | None = None) -> tuple[FloatArray, FloatArray]:
        """Logits after each token, and what further drafts read of it, [tokens, width]."""
        count = len(tokens)
        ids, wanted = (c_int32 * count)(*tokens), (c_int8 * count)(*[1] * count)
        rows = None if hidden is None else np.ascontiguousarray(hidden, np.float32)
        given = None if rows is None else cast(rows.ctypes.data, c_void_p)
        batch = Batch(n_tokens=count, token=ids, embd=given, logits=wanted)
        if self._library.llama_decode(self._handle, batch):
            raise failure("llama.cpp refused a batch")
        states = _function("_Z26llama_get_embeddings_nextnP13llama_context", POINTER(c_float), c_void_p)(self._handle)
        logits = self._library.llama_get_logits(self._handle)
        return (
            np.ctypeslib.as_array(logits, (count, self._vocabulary)).copy(),
            np.ctypeslib.as_array(states, (count, self.width)).copy(),
        )


def _function(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(load_library(), name)
    function.restype, function.argtypes = result, arguments
    return function


def _draft(path: str, draft: str, texts: Sequence[Sequence[int]], most: int) -> dict[str, Any]:
    room = max(map(len, texts)) + most
    model, drafting = _Context(path, room, 0), _Context(draft, room, _DRAFTING)
    found = {}
    for number, tokens in enumerate(texts):
        model.clear()
        drafting.clear()
        logits, hidden = model.decode(tokens)
        pairs, states = drafting.decode(tokens[1:], hidden[:-1])
        steps, said = [pairs[-1]], [int(pairs[-1].argmax())]
        while len(said) < most:
            step, states = drafting.decode(said[-1:], states[-1:])
            steps.append(step[0])
            said.append(int(step[0].argmax()))
        drafted = Drafted(logits, pairs, np.stack(steps), np.array(said, np.int64))
        found |= {f"{number} {name}": value for name, value in drafted._asdict().items()}
    return found


if __name__ == "__main__":
    written = io.BytesIO()
    np.savez(written, **_draft(*json.load(sys.stdin)))
    sys.stdout.buffer.write(written.getvalue())
