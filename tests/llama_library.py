"""llama.cpp's C API for `llama.py`: structures and signatures as llama.h declares them, checked against the library.

The parameter structures go by value and change between releases of llama.cpp (one more field, and every later one is
read from the wrong place), so the defaults below are compared with what the library itself returns before it is used.
"""

import ctypes
import functools
import importlib.util
import platform
from collections import deque
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

_LOG_ERROR, _LOG_CONTINUED = 4, 5

Fields = tuple[tuple[str, Any, Any], ...]  # field, type, default

_MODEL_FIELDS: Fields = (
    ("devices", c_void_p, None),
    ("tensor_buft_overrides", c_void_p, None),
    ("n_gpu_layers", c_int32, -1),
    ("split_mode", c_int32, 1),
    ("load_mode", c_int32, -1),
    ("lazy_mode", c_int32, 1),
    ("main_gpu", c_int32, 0),
    ("tensor_split", c_void_p, None),
    ("progress_callback", c_void_p, None),
    ("progress_callback_user_data", c_void_p, None),
    ("kv_overrides", c_void_p, None),
    ("vocab_only", c_bool, False),
    ("check_tensors", c_bool, False),
    ("use_extra_bufts", c_bool, True),
    ("no_host", c_bool, False),
    ("no_alloc", c_bool, False),
    ("load_mtp", c_bool, False),
)
_CONTEXT_FIELDS: Fields = (
    ("n_ctx", c_uint32, 512),
    ("n_batch", c_uint32, 2048),
    ("n_ubatch", c_uint32, 512),
    ("n_seq_max", c_uint32, 1),
    ("n_rs_seq", c_uint32, 0),
    ("n_outputs_max", c_uint32, 0),
    ("n_outputs_max_per_seq", c_uint32, 1),
    ("n_threads", c_int32, 4),
    ("n_threads_batch", c_int32, 4),
    ("ctx_type", c_int32, 0),
    ("rope_scaling_type", c_int32, -1),
    ("pooling_type", c_int32, -1),
    ("attention_type", c_int32, -1),
    ("flash_attn_type", c_int32, -1),
    ("rope_freq_base", c_float, 0.0),
    ("rope_freq_scale", c_float, 0.0),
    ("yarn_ext_factor", c_float, -1.0),
    ("yarn_attn_factor", c_float, -1.0),
    ("yarn_beta_fast", c_float, -1.0),
    ("yarn_beta_slow", c_float, -1.0),
    ("yarn_orig_ctx", c_uint32, 0),
    ("defrag_thold", c_float, -1.0),
    ("cb_eval", c_void_p, None),
    ("cb_eval_user_data", c_void_p, None),
    ("type_k", c_int32, 1),
    ("type_v", c_int32, 1),
    ("moe_cache_size", c_size_t, 0),
    ("abort_callback", c_void_p, None),
    ("abort_callback_data", c_void_p, None),
    ("embeddings", c_bool, False),
    ("offload_kqv", c_bool, True),
    ("no_perf", c_bool, True),
    ("op_offload", c_bool, True),
    ("swa_full", c_bool, True),
    ("kv_unified", c_bool, False),
    ("samplers", c_void_p, None),
    ("n_samplers", c_size_t, 0),
    ("ctx_other", c_void_p, None),
)


def _structure(name: str, fields: Fields) -> type[ctypes.Structure]:
    """The C structure of `fields` with room behind it, so that a longer one overruns nothing and is noticed."""
    types = [(field, kind) for field, kind, _ in fields]
    return type(name, (ctypes.Structure,), {"_fields_": [*types, ("room", c_uint64 * 32)]})


_ModelParameters = _structure("ModelParameters", _MODEL_FIELDS)
_ContextParameters = _structure("ContextParameters", _CONTEXT_FIELDS)


def model_parameters(**changes: Any) -> ctypes.Structure:
    """`llama_model_params`: the defaults with `changes`."""
    return _ModelParameters(**{field: default for field, _, default in _MODEL_FIELDS} | changes)


def context_parameters(**changes: Any) -> ctypes.Structure:
    """`llama_context_params`: the defaults with `changes`."""
    return _ContextParameters(**{field: default for field, _, default in _CONTEXT_FIELDS} | changes)


class Batch(ctypes.Structure):
    """`llama_batch`; positions and sequences stay NULL: counted from the cache's end, sequence 0."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", POINTER(c_int8)),
    )


_LogCallback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)

_SIGNATURES: dict[str, tuple[Any, ...]] = {  # name: result, arguments
    "llama_version": (c_char_p,),
    "llama_ftype_name": (c_char_p, c_int32),
    "llama_backend_init": (None,),
    "llama_log_set": (None, _LogCallback, c_void_p),
    "llama_model_load_from_file": (c_void_p, c_char_p, _ModelParameters),
    "llama_model_free": (None, c_void_p),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_vocab_type": (c_int32, c_void_p),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_vocab_get_add_bos": (c_bool, c_void_p),
    "llama_vocab_bos": (c_int32, c_void_p),
    "llama_tokenize": (c_int32, c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool),
    "llama_init_from_model": (c_void_p, c_void_p, _ContextParameters),
    "llama_free": (None, c_void_p),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_clear": (None, c_void_p, c_bool),
    "llama_decode": (c_int32, c_void_p, Batch),
    "llama_get_logits": (POINTER(c_float), c_void_p),
}

errors: deque[str] = deque(maxlen=8)  # the last error lines; llama.cpp has one log for the whole process
_continues_error = False


def _keep_errors(level: int, text: bytes, _: object) -> None:
    global _continues_error
    if level != _LOG_CONTINUED:
        _continues_error = level == _LOG_ERROR
    if _continues_error:
        errors.append(text.decode(errors="replace").strip())


_log_callback = _LogCallback(_keep_errors)  # a module's name, for llama.cpp keeps the pointer and not the object


def _defaults(function: Any, structure: type[ctypes.Structure]) -> ctypes.Structure:
    """What one of the library's two default functions returns, zero behind what it wrote."""
    if platform.machine() in ("x86_64", "AMD64"):
        # This ABI hands over a large result through a pointer before the arguments: give it zeroed memory.
        function.restype, function.argtypes = None, [POINTER(structure)]
        values = structure()
        function(values)
        return values
    function.restype = structure
    returned: ctypes.Structure = function()
    returned.room[:] = [0] * len(returned.room)
    return returned


def check_layout(values: ctypes.Structure, fields: Fields, version: str) -> None:
    """Compare the default `values` that the library returned with `fields`.

    Raises:
        RuntimeError: a field differs, so this llama.cpp lays the structure out otherwise and must not be called.
    """
    found = [(field, getattr(values, field), default) for field, _, default in fields]
    found.append(("data behind the last field", any(values.room), False))
    different = [f"{field} is {value!r}, not {default!r}" for field, value, default in found if value != default]
    if different:
        raise RuntimeError(
            f"xllamacpp carries llama.cpp {version}, whose {type(values).__name__} tests/llama_library.py does not"
            f" know ({'; '.join(different)}): install the pinned xllamacpp, or bring the tables up to date"
        )


def load_library() -> ctypes.CDLL:
    """The shared object, its signatures declared and its layouts checked; its log is ours again, whoever took it."""
    library = _library()
    library.llama_log_set(_log_callback, None)
    return library


@functools.cache
def _library() -> ctypes.CDLL:
    package = importlib.util.find_spec("xllamacpp")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("these tests need llama.cpp: pip install xllamacpp")
    library = ctypes.CDLL(str(next(Path(package.origin).parent.glob("xllamacpp*.so"))))
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    version = library.llama_version().decode()
    check_layout(_defaults(library.llama_model_default_params, _ModelParameters), _MODEL_FIELDS, version)
    check_layout(_defaults(library.llama_context_default_params, _ContextParameters), _CONTEXT_FIELDS, version)
    library.llama_backend_init()
    return library


def failure(what: str) -> RuntimeError:
    """The error that says `what` and what llama.cpp logged since `errors` was cleared."""
    return RuntimeError(f"{what}: {'; '.join(errors) or 'llama.cpp gave no reason'}")
