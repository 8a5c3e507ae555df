"""llama.cpp as a test oracle: a small ctypes binding to the C API that xllamacpp's shared object exports.

    with Engine("model.gguf") as engine:
        tokens = engine.tokenize("Once upon a time", add_special=True)
        logits = engine.logits(tokens)                       # float32 [len(tokens), engine.vocabulary]
        value, count = perplexity(engine, tokens, context=64)
    logits = run_isolated("model.gguf", tokens)              # the same in a process of its own

Everything runs on the CPU with a float32 cache and plain attention, so that what differs from another engine is that
engine's doing. A file that llama.cpp refuses raises RuntimeError with llama.cpp's own words. Some faults are no
refusal but a failed assertion that ends the process (a GGUF that loads and lacks a key its graph needs, for one): for
a file that may be wrong use `run_isolated`.
"""

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from ctypes import c_int8, c_int32
from typing import Any, Self

import numpy as np
from llama_library import Batch, context_parameters, errors, failure, load_library, model_parameters
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

CACHE_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}  # ggml_type
_VOCABULARY_NONE = 0  # llama_vocab_type


class Engine:
    """A GGUF file loaded by llama.cpp on the CPU.

    Args:
        path: the file, or the first shard of a split one.
        context: most tokens that `logits` takes; one prefill computes them all.
        threads: CPU threads.
        kv_type: type of both cache halves, a key of `CACHE_TYPES` (q8_0 needs flash attention).
        flash_attention: use the fused attention kernel.
        vocab_only: load the tokenizer, not the weights; `logits` then refuses.
        settings: further parameters of the context, as llama.cpp's command line sets them.

    Attributes:
        vocabulary: number of tokens, the width of `logits`.
        bos_token: the token that llama.cpp puts before every text, None where the file asks for none.
        context_size: the argument `context`.

    Raises:
        RuntimeError: llama.cpp refused the file, in its own words.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        context: int = 512,
        threads: int = 1,
        kv_type: str = "f32",
        flash_attention: bool = False,
        vocab_only: bool = False,
        settings: Mapping[str, float] | None = None,
    ) -> None:
        self._library = load_library()
        self._model: int | None = self._load(path, vocab_only)
        self._context: int | None = None
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.vocabulary = int(self._library.llama_vocab_n_tokens(self._vocabulary))
        adds_bos = self._library.llama_vocab_get_add_bos(self._vocabulary)
        self.bos_token: int | None = self._library.llama_vocab_bos(self._vocabulary) if adds_bos else None
        self.context_size = context
        if vocab_only:
            return
        try:
            self._context = self._new_context(path, context, threads, kv_type, flash_attention, settings or {})
        except BaseException:
            self.close()
            raise

    def _load(self, path: str | os.PathLike[str], vocab_only: bool) -> int:
        # Extra buffers hold weights repacked for AMX and the like, which changes the numbers and may crash.
        parameters = model_parameters(n_gpu_layers=0, vocab_only=vocab_only, use_extra_bufts=False)
        errors.clear()
        model: int | None = self._library.llama_model_load_from_file(os.fsencode(path), parameters)
        if model is None:
            raise failure(f"llama.cpp cannot load {os.fspath(path)}")
        return model

    def _new_context(
        self,
        path: str | os.PathLike[str],
        context: int,
        threads: int,
        kv_type: str,
        flash_attention: bool,
        settings: Mapping[str, float],
    ) -> int:
        parameters = context_parameters(
            n_ctx=context,
            n_batch=context,
            n_ubatch=context,
            n_threads=threads,
            n_threads_batch=threads,
            type_k=CACHE_TYPES[kv_type],
            type_v=CACHE_TYPES[kv_type],
            flash_attn_type=int(flash_attention),  # 0 never, 1 always, -1 (the default) llama.cpp's choice
            offload_kqv=False,
            op_offload=False,
            **settings,
        )
        errors.clear()
        handle: int | None = self._library.llama_init_from_model(self._model, parameters)
        if handle is None:
            raise failure(f"llama.cpp cannot make a context for {os.fspath(path)}")
        return handle

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; closing again does nothing."""
        if self._context is not None:
            self._library.llama_free(self._context)
        if self._model is not None:
            self._library.llama_model_free(self._model)
        self._context = self._model = None

    def tokenize(self, text: str, add_special: bool, parse_special: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
            text: any text.
            add_special: put BOS and EOS where the file asks for them.
            parse_special: read the spelling of a control token as that token, not as plain text.

        Raises:
            ValueError: the engine is closed, or the file has no tokenizer.
        """
        if self._model is None:
            raise ValueError("this engine is closed")
        if self._library.llama_vocab_type(self._vocabulary) == _VOCABULARY_NONE:
            raise ValueError("the file has no tokenizer (tokenizer.ggml.model is none)")
        data = text.encode()
        call = functools.partial(self._library.llama_tokenize, self._vocabulary, data, len(data))
        count = -call(None, 0, add_special, parse_special)  # without room it returns minus the tokens needed
        tokens = (c_int32 * count)()
        call(tokens, count, add_special, parse_special)
        return list(tokens)

    def logits(self, tokens: Sequence[int]) -> FloatArray:
        """Logits after each of `tokens`, from an empty cache.

        Args:
            tokens: ids, at least one and at most `context_size`.

        Returns:
            float32 [len(tokens), vocabulary].

        Raises:
            ValueError: too many tokens, or the engine holds a vocabulary only.
            RuntimeError: llama.cpp refused the batch, in its own words.
        """
        if self._context is None:
            raise ValueError("logits need the weights: this engine is closed or was loaded with vocab_only")
        count = len(tokens)
        if not 0 < count <= self.context_size:
            raise ValueError(f"{count} tokens given, from 1 to {self.context_size} fit (context={self.context_size})")
        batch = Batch(n_tokens=count, token=(c_int32 * count)(*tokens), logits=(c_int8 * count)(*[1] * count))
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        errors.clear()
        status = self._library.llama_decode(self._context, batch)
        if status != 0:
            raise failure(f"llama_decode returned {status}")
        values = self._library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(values, (count, self.vocabulary)).copy()


def log_softmax(logits: FloatArray) -> NDArray[np.float64]:
    """Natural log-probabilities [..., vocabulary] of `logits`, computed in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def mean_divergence(reference: FloatArray, candidate: FloatArray) -> float:
    """Mean over positions of KL(reference || candidate) in nats, from two arrays of logits [positions, vocabulary]."""
    expected = log_softmax(reference)
    return float((np.exp(expected) * (expected - log_softmax(candidate))).sum(axis=-1).mean())


def perplexity(engine: Engine, tokens: Sequence[int], context: int) -> tuple[float, int]:
    """Perplexity as llama-perplexity defines it.

    The tokens fall into whole chunks of `context`, each run from an empty cache with its first token replaced by BOS
    where the file asks for BOS. Only the second half of a chunk counts: the predictions from position context // 2 on.

    Args:
        engine: an engine whose `context_size` is at least `context`.
        tokens: the text's tokens, BOS included (`tokenize(text, add_special=True)`), at least two chunks.
        context: chunk length in tokens.

    Returns:
        The perplexity and the number of predictions it is the mean of.

    Raises:
        ValueError: fewer than two chunks, which llama-perplexity refuses.
    """
    if len(tokens) < 2 * context:
        raise ValueError(f"{len(tokens)} tokens given, two chunks of {context} are the least")
    first = context // 2
    scores = []
    for start in range(0, len(tokens) - context + 1, context):
        chunk = list(tokens[start : start + context])
        targets = chunk[first + 1 :]
        if engine.bos_token is not None:
            chunk[0] = engine.bos_token
        predictions = log_softmax(engine.logits(chunk)[first:-1])
        scores.append(predictions[np.arange(len(targets)), targets])
    joined = np.concatenate(scores)
    return float(np.exp(-joined.mean())), len(joined)


def run_isolated(path: str | os.PathLike[str], tokens: Sequence[int], **options: Any) -> FloatArray:
    """`Engine(path, **options).logits(tokens)` in a process of its own, which may crash.

    Raises:
        RuntimeError: the process failed; says how it ended and the last lines it wrote.
    """
    request = json.dumps({"path": os.fspath(path), "tokens": [int(token) for token in tokens], "options": options})
    result = subprocess.run(
        [sys.executable, __file__],
        input=request.encode(),
        capture_output=True,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # else a failed assertion starts a debugger
    )
    if result.returncode != 0:
        code = result.returncode
        ending = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        tail = "\n".join(result.stderr.decode(errors="replace").strip().splitlines()[-20:])
        raise RuntimeError(f"llama.cpp's process ended with {ending}: {tail}")
    return np.frombuffer(result.stdout, np.float32).reshape(len(tokens), -1).copy()


def _serve() -> None:
    """The other end of `run_isolated`: a request as JSON on stdin, the raw float32 logits on stdout."""
    request = json.load(sys.stdin)
    try:
        with Engine(request["path"], **request["options"]) as engine:
            sys.stdout.buffer.write(engine.logits(request["tokens"]).tobytes())
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    _serve()
