"""The files around an ONNX model: its description for our runner, the settings of onnxruntime-genai, the tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ... import __version__
from ...archs.graph import Attention, Graph
from ...errors import BadInput
from ...quant.planning.onnx_plan import OnnxPlan
from ...runner.engines import DESCRIPTION_NAME, MODEL_NAME
from ...sources.chat_templates import further_templates
from ...sources.tokenizer import Tokenizer
from .builder import State

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tiktoken.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_GENAI_STATES = {
    "past_key_values.%d.key": "key",
    "past_key_values.%d.value": "value",
    "past.%d.conv": "conv",
    "past.%d.recurrent": "recurrent",
}
"""The states that onnxruntime-genai knows, by their inputs' names, and what its settings call them."""


def model_files(
    model: ir.Model, states: Sequence[State], plan: OnnxPlan, source: Path, tokenizer: Tokenizer, activations: str
) -> dict[str, bytes]:
    """Contents by file name, which may have a folder. Raises BadInput when a tokenizer file cannot be read."""
    description = {
        "moecast": __version__,
        "architecture": plan.graph.architecture,
        "quant": plan.recipe.name,
        "activations": activations,
        "vocabulary_size": plan.graph.vocabulary_size,
        "context_length": plan.graph.context_length,
        "operators": operators(model),
        "states": [asdict(state) for state in states],
    }
    files = {DESCRIPTION_NAME: _json(description), MODEL_NAME: ir.serde.serialize_model(model).SerializeToString()}
    attention = next((operation for operation in plan.graph.operations() if isinstance(operation, Attention)), None)
    if attention and {*_patterns(states)} <= {*_GENAI_STATES}:
        files["genai_config.json"] = _json(genai_config(plan.graph, attention, model, states, tokenizer))
    for path in (*(source / name for name in _TOKENIZER_FILES), *further_templates(source)):
        if path.is_file():
            try:
                files[path.relative_to(source).as_posix()] = path.read_bytes()
            except OSError as error:
                raise BadInput(f"{path} cannot be read: {error.strerror}") from None
    return files


def operators(model: ir.Model) -> list[str]:
    """Every kind of operator in a model, ONNX Runtime's own with their domain."""
    return sorted({f"{node.domain}.{node.op_type}".lstrip(".") for node in model.graph})


def _patterns(states: Sequence[State]) -> dict[str, str]:
    """Names of the states' inputs and outputs, with %d for the layer."""
    return {re.sub(r"\d+", "%d", state.input): re.sub(r"\d+", "%d", state.output) for state in states}


def genai_config(
    graph: Graph, attention: Attention, model: ir.Model, states: Sequence[State], tokenizer: Tokenizer
) -> dict[str, Any]:
    """What onnxruntime-genai needs to know, for its generic kind of decoder."""
    given = {value.name for value in model.graph.inputs}
    inputs: dict[str, str] = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in given}
    outputs: dict[str, str] = {"logits": "logits"}
    for past, present in _patterns(states).items():
        inputs[f"past_{_GENAI_STATES[past]}_names"] = past
        outputs[f"present_{_GENAI_STATES[past]}_names"] = present
    ends = sorted(tokenizer.end_of_generation)
    padding = tokenizer.padding if tokenizer.padding is not None else tokenizer.eos
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": tokenizer.bos if tokenizer.bos is not None else tokenizer.eos,
            "eos_token_id": ends,
            "pad_token_id": padding,
            "vocab_size": graph.vocabulary_size,
            "context_length": graph.context_length,
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": MODEL_NAME,
                "hidden_size": graph.hidden_size,
                "head_size": attention.head_size,
                "num_attention_heads": attention.heads,
                "num_key_value_heads": attention.key_value_heads,
                "num_hidden_layers": len(graph.layers),
                "inputs": inputs,
                "outputs": outputs,
            },
        },
        "search": {"max_length": graph.context_length, "past_present_share_buffer": False, "do_sample": False},
    }


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
