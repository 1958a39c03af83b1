"""Tiny configurations of any family of transformers, by the names that their fields have in common.

A field that is known by its name is set to a small number, never to more than its default. Lists with one entry per
layer are cut to the layers that differ in kind. What this gets wrong in a family is set in `overrides.py`.
"""

import dataclasses
import re
from dataclasses import MISSING
from typing import Any

from experiments.models.overrides import COMMON, OVERRIDES

VOCABULARY, WIDTH, HIDDEN, HEADS, HEAD, LAYERS = 40, 16, 24, 2, 8, 2
PLACES = 64  # the longest text of any model
WINDOW = 5  # the last padded place of the shortest text still sees a token: with none, attention gives NaN

SIZES = (  # (what the whole name must match, the largest value); the first match counts
    (r"(.*_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"(max|n|max_source|max_target|original_max)_(position_embeddings|positions|position)|n_ctx|max_seq_len", PLACES),
    (r"num_hidden_groups|inner_group_num|num_mem_blocks|num_shared_experts|n_shared_experts", 1),
    (r".*(kv_heads|key_value_heads|num_kv_heads|query_groups|linear_num_key_heads)", 1),
    (r"(.*_)?(num_heads|n_heads|n_head|attention_heads|num_value_heads|n_mamba_heads|mamba_heads)", HEADS),
    (r"mamba_num_heads|mamba_n_heads|index_n_heads|linear_num_heads", HEADS),
    (r"(.*_)?(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|num_blocks)", LAYERS),
    (r"(.*_)?(qk_rope_head_dim|rope_head_dim|rotary_dim)", HEAD // 2),
    (r"(.*_)?(nope_head_dim)", HEAD // 2),
    (r"(.*_)?(head_dim|d_kv|d_head|dim_head|kv_channels|head_size|mamba_d_head|key_head_dim|value_head_dim)", HEAD),
    (
        r"(.*_)?(intermediate_size.*|ffn_dim|d_ff|dff|dim_ff|ffn_hidden_size|inner_dim|hidden_dim|d_inner|n_inner)",
        HIDDEN,
    ),
    (r"(.*_)?(expert_hidden_size|feed_forward_size|intermediate_dim|block_ff_dim)", HIDDEN),
    (r"(.*_)?(lora_rank|laurel_rank|lowrank|adapter_rank|mamba_dt_rank|time_step_rank)", HEAD),
    (r"(.*_)?(d_state|state_size)", HEAD),
    (r"(.*_)?(hidden_size(_per_layer_input)?|d_model|n_embd|embedding_size|embed_dim|embedding_dim|emb_dim)", WIDTH),
    (
        r"(.*_)?(word_embed_proj_dim|lru_width|attention_hidden_size|classifier_proj_size|emb_size|projection_dim)",
        WIDTH,
    ),
    (r"dim|pooler_output_size|codevector_dim|proj_codevector_dim|xvector_output_dim|output_hidden_size", WIDTH),
    (r"(.*_)?(num_experts|n_routed_experts|num_local_experts|moe_num_experts|expert_num)", 4),
    (r"(num_)?experts_per_tok(en)?|.*moe_topk|moe_k|top_k_experts|moe_top_k", 2),
    (r"n_group|num_expert_group", 2),
    (r"topk_group", 1),
    (r".*chunk_size|mamba_chunk_size", 4),
    (r"sliding_window(_size)?|local_attention|attention_window_size|keep_window_size|index_topk", WINDOW),
    (r"image_size|input_size", 32),
    (r"patch_size", 8),
    (r"window_size", 2),
    (r"kernel_size", 3),
    (r"(mamba_)?expand|(mamba_)?n_?groups", 1),
    (r"num_conv_pos_embeddings", 4),
    (r"num_conv_pos_embedding_groups", 2),
    (r"num_mel_bins", 16),
)
SCALES = (  # the same for lists of sizes, entry by entry
    (r"depths|layer_depths|num_blocks", 1),
    (r"(num_)?(attention_)?heads|num_attention_heads", HEADS),
    (r"hidden_sizes|embed_dims?|embedding_size|neck_hidden_sizes|conv_dim|tdnn_dim|embed_dim|stem_channels", WIDTH),
    (r"sr_ratios", 2),
)
RANDOM = re.compile(r".*(drop|jitter|noise|mask_time_prob|mask_feature_prob).*")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 3, "decoder_start_token_id": 1}


def tiny_config(config_class: type, *, causal: bool = False) -> Any:
    """A small configuration of this class; `causal` for families that are encoders unless they are told."""
    decoder = causal and "is_decoder" in {field.name for field in dataclasses.fields(config_class)}
    return config_class(**fields_of(config_class, {"is_decoder": True} if decoder else {}))


def fields_of(config_class: type, extra: dict[str, Any]) -> dict[str, Any]:
    """The fields to build it with: the common ones by name, then the family's own."""
    override = OVERRIDES.get(config_class.model_type, {})
    own = {key: value for key, value in override.items() if not key.startswith("_")}
    plain = {
        key: value for key, value in own.items() if not isinstance(value, dict) or key not in sub_classes(config_class)
    }
    default = config_class(**override.get("_default", {}))
    names = {field.name for field in dataclasses.fields(config_class)} | set(COMMON)
    values = {key: value for key in names if (value := held(default, key)) is not MISSING}
    found = {key: small(key, value) for key, value in values.items()}
    found = {key: value for key, value in found.items() if value is not None and value != values[key]}
    found |= per_layer(values)
    heads, shared = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if "num_key_value_heads" in found and heads == shared:
        found["num_key_value_heads"] = HEADS
    if "head_dim" in names and values.get("head_dim", 0) is None:
        found["head_dim"] = HEAD
    if values.get("qk_rope_head_dim") and values.get("head_dim") == values["qk_rope_head_dim"]:
        found["head_dim"] = found["qk_rope_head_dim"]
    found |= {key: value for key, value in TOKENS.items() if key in names or values.get(key) is not None}
    for key in sub_classes(config_class):
        inner_config = getattr(default, key, None)
        if hasattr(inner_config, "model_type"):
            sub = type(inner_config)
            found[key] = sub(**fields_of(sub, own.get(key, {})))
    found |= {"use_cache": False} if "use_cache" in names else {}
    for key in override.get("_leave", ()):
        found.pop(key, None)
    return found | plain | extra


def held(config: Any, key: str) -> Any:
    """The field's value, or MISSING where there is none for the whole model."""
    try:
        return getattr(config, key)
    except Exception:  # some differ from layer to layer
        return MISSING


def sub_classes(config_class: type) -> dict[str, Any]:
    """The configurations inside it."""
    return getattr(config_class, "sub_configs", None) or {}


def small(key: str, value: Any) -> Any:
    """A small value for the field, or None where its name says nothing."""
    if isinstance(value, bool) or value is None or isinstance(value, (str, dict)):
        return None
    if isinstance(value, (int, float)) and RANDOM.fullmatch(key):
        return type(value)(0)
    if isinstance(value, int):
        return next((min(value, size) for name, size in SIZES if re.fullmatch(name, key)), None)
    if isinstance(value, (list, tuple)) and value and all(type(each) is int for each in value):
        if key in ("image_size", "patch_size", "window_size"):
            return type(value)(min(each, 32 if key == "image_size" else 4) for each in value)
        size = next((size for name, size in SCALES if re.fullmatch(name, key)), None)
        return None if size is None else type(value)(min(each, size) for each in value)
    return None


def per_layer(values: dict[str, Any]) -> dict[str, Any]:
    """Lists with one entry per layer, cut to the first layer of each kind, and the number of layers that it takes."""
    key = next((name for name in ("num_hidden_layers", "num_layers", "n_layer") if type(values.get(name)) is int), None)
    depth = values.get(key) if key else None
    lists = {
        name: value
        for name, value in values.items()
        if isinstance(value, (list, tuple))
        and len(value) == depth
        and name not in ("id2label", "depths", "hidden_sizes")
    }
    words = [value for value in lists.values() if value and isinstance(value[0], str)]
    if not lists or depth is None:
        return {}
    kinds: dict[Any, int] = {}
    for layer in range(depth):
        kinds.setdefault(tuple(value[layer] for value in words), layer)
    chosen = sorted(kinds.values())
    chosen = (chosen + [layer for layer in range(depth) if layer not in chosen])[: max(LAYERS, len(chosen))]
    chosen.sort()
    return {name: type(value)(value[layer] for layer in chosen) for name, value in lists.items()} | {key: len(chosen)}
