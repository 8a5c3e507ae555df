"""llama.cpp's own drafts as an oracle: what multi-token prediction says after texts, from the model's hidden states.

    first, second = run_isolated("model.gguf", "model-mtp.gguf", [tokens, others], most=3)

The pairs of a hidden state and the token after it are read in one batch, then each drafted token in one of its own; of
drafts of blocks (DSpark) the texts' last token and its masks are one batch, after the keys of all tokens before.
"""

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_float, c_int8, c_int32, c_uint32, c_void_p, cast
from typing import Any, NamedTuple

import gguf
import numpy as np
from llama_library import Batch, context_parameters, failure, load_library, model_parameters
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
_DRAFTING = 1  # llama_context_type


class Drafted(NamedTuple):
    """Of n tokens: logits of the model [n, vocabulary], and the tokens of the draft after them, [most], with the logits
    that they are the best of; of a draft of blocks how sure it is of each, else ones."""

    model: FloatArray
    steps: FloatArray
    tokens: NDArray[np.int64]
    confidence: FloatArray


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

    def __init__(self, path: str, tokens: int, kind: int = 0, beside: "_Context | None" = None) -> None:
        self._library = load_library()
        parameters = model_parameters(n_gpu_layers=0, use_extra_bufts=False, load_mtp=True)
        model = self._library.llama_model_load_from_file(os.fsencode(path), parameters)
        if model is None:
            raise failure(f"llama.cpp cannot load {path}")
        self._vocabulary = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(model))
        self.width = _function("llama_model_n_embd_out", c_int32, c_void_p)(model)
        self.hidden = _function("llama_model_n_embd", c_int32, c_void_p)(model)
        sizes = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), tokens)
        plain = {"type_k": 0, "type_v": 0, "flash_attn_type": 0, "offload_kqv": False, "op_offload": False}
        settings = context_parameters(**sizes, **plain, n_threads=1, n_threads_batch=1, ctx_type=kind)
        settings.ctx_other = beside._handle if beside else None
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
        self._run(tokens, hidden)
        logits = self._library.llama_get_logits(self._handle)
        return np.ctypeslib.as_array(logits, (len(tokens), self._vocabulary)).copy(), self._states(len(tokens))

    def fuse(self, features: FloatArray) -> None:
        """Keys of tokens of which a draft of blocks is given what its model's layers leave, [tokens, features]."""
        self._run(None, features)

    def watch(self, layers: Sequence[int]) -> None:
        """Keep what comes into these layers."""
        for layer in layers:
            _function("_Z30llama_set_embeddings_layer_inpP13llama_contextjb", None, c_void_p, c_uint32, c_bool)(
                self._handle, layer, True
            )

    def watched(self, layer: int, tokens: int) -> FloatArray:
        """What came into a layer, [tokens, hidden size]."""
        get = _function("_Z30llama_get_embeddings_layer_inpP13llama_contextj", POINTER(c_float), c_void_p, c_uint32)
        return np.ctypeslib.as_array(get(self._handle, layer), (tokens, self.hidden)).copy()

    def see_all(self) -> None:
        """Tokens of a batch see one another."""
        _function("llama_set_causal_attn", None, c_void_p, c_bool)(self._handle, False)

    def _run(self, tokens: Sequence[int] | None, rows: FloatArray | None) -> None:
        count = len(tokens if tokens is not None else rows)  # type: ignore[arg-type]
        ids = None if tokens is None else (c_int32 * count)(*tokens)
        given = None if rows is None else np.ascontiguousarray(rows, np.float32)
        batch = Batch(
            n_tokens=count,
            token=ids,
            embd=None if given is None else cast(given.ctypes.data, c_void_p),
            logits=(c_int8 * count)(*[tokens is not None] * count),
        )
        if self._library.llama_decode(self._handle, batch):
            raise failure("llama.cpp refused a batch")

    def _states(self, count: int) -> FloatArray:
        get = _function("_Z26llama_get_embeddings_nextnP13llama_context", POINTER(c_float), c_void_p)
        return np.ctypeslib.as_array(get(self._handle), (count, self.width)).copy()


def _function(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(load_library(), name)
    function.restype, function.argtypes = result, arguments
    return function


def _draft(path: str, draft: str, texts: Sequence[Sequence[int]], most: int) -> dict[str, Any]:
    with open(draft, "rb") as file:
        blocks = _blocks_of(draft) if b"markov_w1" in file.read(1 << 20) else None
    room = max(map(len, texts)) + most
    model = _Context(path, room)
    drafting = _Context(draft, room, beside=model) if blocks else _Context(draft, room, _DRAFTING)
    found: dict[str, Any] = {}
    for number, tokens in enumerate(texts):
        model.clear()
        drafting.clear()
        if blocks:
            logits, steps, sure = _of_blocks(model, drafting, tokens, blocks)
        else:
            logits, steps = _one_by_one(model, drafting, tokens, most)
            sure = np.ones(most, np.float32)
        drafted = Drafted(logits, steps[:most], steps[:most].argmax(axis=1), sure[:most])
        found |= {f"{number} {name}": value for name, value in drafted._asdict().items()}
    return found


def _one_by_one(model: _Context, drafting: _Context, tokens: Sequence[int], most: int) -> tuple[FloatArray, FloatArray]:
    logits, hidden = model.decode(tokens)
    pairs, states = drafting.decode(tokens[1:], hidden[:-1])
    steps = [pairs[-1]]
    while len(steps) < most:
        step, states = drafting.decode([int(steps[-1].argmax())], states[-1:])
        steps.append(step[0])
    return logits, np.stack(steps)


def _blocks_of(path: str) -> tuple[list[int], int, int]:
    """Numbers of the layers whose inputs are read, the mask, and how long a block is."""
    fields = gguf.GGUFReader(path).fields
    keys = ("dflash.target_layers", "tokenizer.ggml.mask_token_id", "dflash.block_size")
    layers, mask, size = (fields[key].contents() for key in keys)
    return layers, mask, size


def _of_blocks(
    model: _Context, drafting: _Context, tokens: Sequence[int], blocks: tuple[list[int], int, int]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    layers, mask, size = blocks
    model.watch(layers)
    drafting.see_all()
    logits = model.decode(tokens)[0]
    features = np.concatenate([model.watched(layer, len(tokens)) for layer in layers], axis=1)
    drafting.fuse(features[:-1])
    steps, sure = drafting.decode([tokens[-1], *[mask] * (size - 1)])
    return logits, steps, sure[:, 0]


if __name__ == "__main__":
    written = io.BytesIO()
    np.savez(written, **_draft(*json.load(sys.stdin)))
    sys.stdout.buffer.write(written.getvalue())
