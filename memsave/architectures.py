"""Architectures of transformers without weights: found by name, built for a task, with a batch; also as tiny copies.

Build on the device `meta`, and call `reallocate` and `batch_for` under FakeTensorMode, to allocate nothing.
"""

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HUB_TIMEOUT = 10.0  # seconds
LAYERS = 8  # of a tiny copy: enough for one of each kind in the patterns that are in use


@dataclass(frozen=True)
class Task:
    """One kind of model of transformers."""

    auto_class: str
    mapping: str
    """The name of the mapping from model types to classes, without MODEL_FOR_ and _MAPPING_NAMES."""
    adapter_type: str | None
    """PEFT's name for it."""


TASKS = {  # by their order of preference where the configuration names no class
    "seq2seq": Task("AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM", "SEQ_2_SEQ_LM"),
    "masked-lm": Task("AutoModelForMaskedLM", "MASKED_LM", None),
    "causal-lm": Task("AutoModelForCausalLM", "CAUSAL_LM", "CAUSAL_LM"),
    "image-classification": Task("AutoModelForImageClassification", "IMAGE_CLASSIFICATION", None),
    "sequence-classification": Task("AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION", "SEQ_CLS"),
    "token-classification": Task("AutoModelForTokenClassification", "TOKEN_CLASSIFICATION", "TOKEN_CLS"),
}
WIDTH, HEADS, HEAD, INNER, VOCABULARY, EXPERTS = 32, 4, 8, 48, 64, 16
SMALL = (  # (what the whole name of a size matches, the largest value in a tiny copy); the first match counts
    (r"(.*_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"(.*_)?(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers)", LAYERS),
    (r"(.*_)?(num_key_value_heads|num_kv_heads|n_head_kv|linear_num_key_heads)", HEADS // 2),
    (r"(.*_)?(num_heads|n_heads?|attention_heads|num_value_heads|mamba_n_heads|mamba_num_heads)", HEADS),
    (r"(.*_)?(rope_head_dim|nope_head_dim|rotary_dim)", HEAD // 2),
    (r"(.*_)?(head_dim|d_kv|d_head|v_head_dim|head_size|state_size|d_state|lora_rank)", HEAD),
    (r"(.*_)?(intermediate_size.*|ffn_dim|d_ff|ffn_hidden_size|inner_dim|hidden_dim|d_inner|n_inner|d_ssm)", INNER),
    (r"(.*_)?(hidden_size(_per_layer_input)?|d_model|n_embd|embedding_size|embed_dim|word_embed_proj_dim)", WIDTH),
    (r"(.*_)?(num_experts|n_routed_experts|num_local_experts|moe_num_experts)", EXPERTS),
    (r"(num_)?experts_per_tok(en)?|moe_k|moe_topk|top_k_experts|moe_top_k", EXPERTS),
    (r"n_group", 2),
    (r"topk_group", 1),
    (r"dim|lru_width", WIDTH),
)


def find_config(name: str) -> tuple[Any, str]:
    """(configuration, a sentence that says where it is from): of a folder, of the hub, or the default of a model type.

    Raises ValueError if there is none.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    folder = Path(name).expanduser()
    if folder.is_dir():
        return _loaded(AutoConfig, str(folder)), f"configuration: the folder {folder}"
    if folder.is_file():
        raise ValueError(f"{name} is a file; give the folder that holds config.json")
    reason = _why_not_on_the_hub(name)
    if reason is None:
        return _loaded(AutoConfig, name), f"configuration: {name} on the hub"
    if name in CONFIG_MAPPING:
        return AutoConfig.for_model(name), (
            f"configuration: the default of the model type {name} (no folder has this name, and the hub has no "
            f"answer: {reason})"
        )
    raise ValueError(
        f"{name} is no folder, no model on the hub that can be reached ({reason}) and no model type of transformers; "
        f"give a folder with config.json, or a model type such as llama"
    )


def _why_not_on_the_hub(name: str) -> str | None:
    """Why the configuration cannot be read from the hub or from an earlier download; None if it can."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return None
        HfApi().model_info(name, timeout=HUB_TIMEOUT)  # one request: transformers repeats its requests for a minute
    except HFValidationError:
        return "it is no name of a model there"
    except Exception as error:  # several HTTP libraries and the hub have their own classes
        return first_line(error)
    return None


def _loaded(auto_config: Any, name: str) -> Any:
    try:
        return auto_config.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} has no configuration that transformers can read ({first_line(error)})") from error


def task_of(config: Any, given: str | None) -> str:
    """The given task, or the one of the class in the configuration, or the first that the model type has."""
    possible = {task: classes for task in TASKS if (classes := _classes(config, task))}
    if given is not None and given in possible:
        return given
    if given is not None and possible:
        raise ValueError(f"transformers has no {config.model_type} for {given}; give one of {', '.join(possible)}")
    if not possible:
        raise ValueError(f"transformers has no {config.model_type} for any of {', '.join(TASKS)}; give another model")
    named = (getattr(config, "architectures", None) or [""])[0]
    if getattr(config, "is_decoder", False) and "causal-lm" in possible and not named:
        return "causal-lm"
    return next((task for task, classes in possible.items() if named in classes), next(iter(possible)))


def _classes(config: Any, task: str) -> tuple[str, ...]:
    from transformers.models.auto import modeling_auto

    found = getattr(modeling_auto, f"MODEL_FOR_{TASKS[task].mapping}_MAPPING_NAMES").get(config.model_type, ())
    return (found,) if isinstance(found, str) else tuple(found)


def build(config: Any, task: str, *, adapter: str | None = None) -> nn.Module:
    """The model with random weights in train mode; `adapter="lora"` makes LoRA trainable on all linear layers."""
    import transformers

    model = getattr(transformers, TASKS[task].auto_class).from_config(config, dtype=torch.float32)
    if adapter == "lora":
        from peft import LoraConfig, get_peft_model

        options = LoraConfig(r=8, target_modules="all-linear", task_type=TASKS[task].adapter_type)
        model = get_peft_model(model, options)
    return model.train()


def reallocate(model: nn.Module) -> None:
    """Put empty tensors on the CPU in place of all parameters and buffers, tied as before."""
    new: dict[int, Tensor] = {}
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False, remove_duplicate=False), *_buffers(module)]:
            if id(tensor) not in new:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                new[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
            setattr(module, name, new[id(tensor)])


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.named_buffers(recurse=False, remove_duplicate=False))


def prepared(config: Any) -> Any:
    """The configuration without the cache of generation, and with a padding token, which classifiers need."""
    for each in {id(each): each for each in (config, config.get_text_config())}.values():
        if hasattr(each, "use_cache"):
            each.use_cache = False
        if getattr(each, "pad_token_id", 0) is None:
            each.pad_token_id = 0
    return config


def batch_for(model: nn.Module, config: Any, task: str, *, batch_size: int, positions: int) -> dict[str, Tensor]:
    """A batch without meaning, whose texts have no padding."""
    inner = getattr(model, "get_base_model", lambda: model)()
    taken = inspect.signature(inner.forward).parameters
    if "pixel_values" in taken and "input_ids" not in taken:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, getattr(vision, "num_channels", 3), height, width)
        return {"pixel_values": torch.arange(batch_size * shape[1] * height * width).sin().view(shape)}
    vocabulary = config.get_text_config().vocab_size
    ids = (torch.arange(batch_size * positions).view(batch_size, positions) * 7 + 5) % vocabulary
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in taken:
        batch |= {"decoder_input_ids": ids.flip(1), "decoder_attention_mask": torch.ones_like(ids)}
    if "bbox" in taken:
        batch["bbox"] = torch.zeros(batch_size, positions, 4, dtype=torch.long)
    any_name = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values())
    return {name: value for name, value in batch.items() if name in taken or any_name}


def tiny(config: Any) -> Any:
    """A copy of the configuration with small sizes and at most `LAYERS` layers."""
    return type(config)(**_shrunk(config.to_dict()))


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    depth = next((values[key] for key in ("num_hidden_layers", "num_layers", "n_layer") if key in values), None)
    heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            found[key] = _shrunk(value)
        elif isinstance(value, (list, tuple)) and len(value) == depth:
            found[key] = type(value)(value[:LAYERS])
        elif isinstance(value, int) and not isinstance(value, bool):
            found[key] = next((min(value, size) for name, size in SMALL if re.fullmatch(name, key)), value)
        else:
            found[key] = value
    if values.get("qk_rope_head_dim") is not None and values["qk_rope_head_dim"] == values.get("head_dim"):
        found["head_dim"] = found["qk_rope_head_dim"]
    if heads is not None and heads == kv_heads:
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
