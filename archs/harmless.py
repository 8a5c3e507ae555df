"""Keys of configurations that change no number of a model, each with the reason; any other one that is left is refused.

A key stands for itself and for all that is nested in it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..errors import BadInput
from .config import Config

_GENERATION = """
    bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
    max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p generation_config
    output_scores
"""
_TRAINING = """
    attention_dropout attn_pdrop aux_loss_alpha embd_pdrop gradient_checkpointing hidden_dropout initializer_range
    max_loss_coeff output_router_logits rescale_prenorm_residual resid_pdrop router_aux_loss_coef router_jitter_noise
    router_z_loss_coef seq_aux time_step_floor time_step_max time_step_min mamba_dt_init_floor mamba_dt_max mamba_dt_min
"""
_LIBRARY = """
    _attn_implementation _attn_implementation_autoset _commit_hash _from_model_config _name_or_path add_cross_attention
    architectures attn_implementation auto_map chunk_size_feed_forward cross_attention_hidden_size custom_pipelines
    finetuning_task id2label is_decoder is_encoder_decoder label2id output_attentions output_hidden_states prefix
    problem_type pruned_heads return_dict sep_token_id task_specific_params tf_legacy_loss tie_encoder_decoder
    tokenizer_class torchscript transformers_version transformers.js_config unsloth_fixed unsloth_version
    use_bfloat16 use_cache
"""
_ARITHMETIC = """
    chunk_size dtype ep_size mamba_chunk_size mamba_ssm_cache_dtype moe_shared_expert_overlap num_logits_to_keep
    pretraining_tp residual_in_fp32 torch_dtype use_mamba_kernels
"""
_QUANTIZATION = """
    act_group_aware activation_scheme backend batch_size block_name_to_quantize cache_block_outputs config_groups
    damp_percent dataset desc_act do_fuse dynamic exllama_config hyb_act lm_head max_input_length meta
    model_file_base_name model_name_or_path model_seqlen module_name_preceding_first_block
    modules_in_block_to_quantize pack_dtype pad_token_id static_groups sym tokenizer true_sequential use_cuda_fp16
    use_exllama zero_point dequantize exclude_modules expert_dtype fmt format global_compression_ratio
    group_size hf_quantizer ignore ignored_layers kv_cache_quant_algo kv_cache_scheme modules_to_not_convert
    moe_quant_algo producer quant_algo quant_method quantization_status quantized_layers scale_fmt targets version
    weight_block_size
"""

_REASONS: dict[str, tuple[str, ...]] = {
    "of sampling, whose settings llama.cpp takes from its command line": tuple(_GENERATION.split()),
    "of training alone": tuple(_TRAINING.split()),
    "of the library that wrote or loads the file": tuple(_LIBRARY.split()),
    "of an engine's arithmetic: how it computes, not what": tuple(_ARITHMETIC.split()),
    "of the tokenizer, whose files say it": ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
    "of the encoding, which follows from the tensors": (
        "expert_dtype",
        *(f"quantization_config.{key}" for key in _QUANTIZATION.split()),
    ),
    "of drafts, which follow from the tensors": (
        "num_nextn_predict_layers",
        "mtp_transformer_layers",
        "num_mtp_modules",
        "use_mtp",
        "mtp_hybrid_override_pattern",
        "mtp_layers_block_type",
    ),
    "a record of how the checkpoint was made": ("reap_pruning", "model_type"),
}
_HARMLESS = {key: reason for reason, keys in _REASONS.items() for key in keys}


def refuse_unread(config: Config, architecture: str, harmless: Collection[str], ignored: Collection[str]) -> None:
    """Raises BadInput naming a key of config.json that nobody read, unless it is known to change nothing.

    Args:
        architecture: what read it.
        harmless: keys that change nothing in this family.
        ignored: those of which the user says so.
    """
    known = {*_HARMLESS, *harmless, *ignored}
    config.section("quantization_config")  # whose keys are looked at one by one
    _refuse(config, architecture, [key for key in config.unread() if known.isdisjoint(_outer(key))])


def refuse_unread_metadata(
    metadata: Config, architecture: str, harmless: Collection[str], ignored: Collection[str]
) -> None:
    """The same for GGUF metadata, of which llama.cpp reads the architecture's own keys alone beside the tokenizer's."""
    known = {*(f"{architecture}.{key}" for key in harmless), *ignored}
    own = (key for key in metadata.unread() if key.startswith(f"{architecture}."))
    _refuse(metadata, architecture, [key for key in own if key not in known])


def _outer(key: str) -> Iterator[str]:
    """A key and those that it is nested in; a language model's beside others are as if it were alone."""
    parts = key.removeprefix("text_config.").split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _refuse(config: Config, architecture: str, unknown: list[str]) -> None:
    if unknown:
        key = unknown[0]
        others = f" (and {len(unknown) - 1} more: {_cut(', '.join(unknown[1:]), 60)})" if unknown[1:] else ""
        raise BadInput(
            f"{config.origin}: {key} is {_cut(repr(config.find(key)), 60)}{others}, which moecast does not know for "
            f"{architecture}; if it does not change the numbers, pass --ignore-config {key}"
        )


def _cut(text: Any, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def check_repeated(metadata: Config, values: Mapping[str, Any]) -> None:
    """Raises BadInput where a key that repeats what others say, as far as a file holds it, says something else.

    Args:
        values: what a file of the graph that was read would say.
    """
    for key, expected in values.items():
        stored = metadata.get(key)
        if stored is not None and not _same(stored, expected):
            raise BadInput(
                f"{metadata.origin}: {key} is {_cut(repr(stored), 60)}, expected {_cut(repr(expected), 60)}, which "
                "follows from the other keys and the tensors"
            )


def _same(stored: Any, expected: Any) -> bool:
    """Lists may go on with entries of drafts, or hold one value many times."""
    if isinstance(stored, list):
        wanted = expected if isinstance(expected, list) else [expected] * len(stored)
        return len(stored) >= len(wanted) and all(map(_same, stored, wanted))
    if isinstance(expected, list):
        return all(_same(stored, value) for value in expected)
    if isinstance(expected, float):
        return isinstance(stored, float | int) and math.isclose(stored, expected, rel_tol=2**-23)
    return bool(stored == expected)
