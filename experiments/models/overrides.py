"""What the rules of `shrink.py` get wrong, by the model type of transformers.

`_leave` names fields to leave at their defaults; `_default` holds what the class cannot be built without; a dictionary
under the name of an inner configuration goes to that one. `_sound`, `_no_mask`, `_image`, `_text` and `_scale` are for
the batch, see `tasks.py`.
"""

from typing import Any

COMMON = ("first_k_dense_replace",)

ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
SWIN: dict[str, Any] = {"image_size": 64, "patch_size": 4}
OVERRIDES: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": 32, "_sound": (32, 16), "_no_mask": True},
    "bit": {"num_groups": 4},
    "bros": {"hidden_size": 64, "num_attention_heads": 2},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROTARY}},
    "cvt": {"_image": 64},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffllama": {"num_key_value_heads": 2},
    "donut-swin": SWIN,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.1},
    "esm": {"_default": {"vocab_size": 33}, "vocab_size": 40},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "_leave": ("attention_layers",)},
    "hgnet_v2": {
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16, 16, 16],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 16, 16, 16],
        "stage_num_blocks": [1, 1, 1, 1],
    },
    "hiera": {"image_size": [32, 32], "patch_size": [7, 7]},
    "imagegpt": {"_text": True},
    "layoutlmv3": {"coordinate_size": 2, "shape_size": 4},
    "levit": {"image_size": 64, "patch_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "mobilevitv2": {"image_size": 64},
    "nemotron": {"num_key_value_heads": 1},
    "neomme": {"head_dim": 16},
    "perceiver": {
        "num_latents": 5,
        "d_latents": 16,
        "d_model": 16,
        "num_blocks": 1,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 1,
    },
    "reformer": {
        "axial_pos_shape": [4, 7],
        "axial_pos_embds_dim": [8, 8],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,
        "_scale": 4,
    },
    "swin": SWIN,
    "t5": {"decoder_start_token_id": 0},
    "wav2vec2-bert": {"feature_projection_input_dim": 16, "_sound": (20, 16)},
    "whisper": {"_sound": (16, 128), "_no_mask": True},
    "xmod": {"default_language": "en_XX"},
}
