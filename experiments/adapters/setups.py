"""The set-ups: a base model, a configuration of PEFT, and what is done to the model afterwards."""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from experiments.models.tasks import Batch

BASES = {  # (class, task, type of task for PEFT), by the name of the family
    "gpt2": ("GPT2LMHeadModel", "causal language model", "CAUSAL_LM"),
    "llama": ("LlamaForCausalLM", "causal language model", "CAUSAL_LM"),
    "qwen3": ("Qwen3ForCausalLM", "causal language model", "CAUSAL_LM"),
    "gemma3_text": ("Gemma3ForCausalLM", "causal language model", "CAUSAL_LM"),
    "mixtral": ("MixtralForCausalLM", "causal language model", "CAUSAL_LM"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "causal language model", "CAUSAL_LM"),
    "mamba": ("MambaForCausalLM", "causal language model", "CAUSAL_LM"),
    "bert": ("BertForSequenceClassification", "text classification", "SEQ_CLS"),
    "roberta": ("RobertaForSequenceClassification", "text classification", "SEQ_CLS"),
    "t5": ("T5ForConditionalGeneration", "text to text", "SEQ_2_SEQ_LM"),
    "vit": ("ViTForImageClassification", "image classification", None),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
BERT = ["query", "value"]
T5 = ["q", "v"]
PATCHES = ["patch_embeddings.projection"]  # the convolution of ViT
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TOKENS = list(range(5, 25))  # every text has some of them
INVOCATION = [33, 34]  # tokens that occur in no text before `invoke` puts them there
Action = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Setup:
    """One row of the table."""

    name: str
    base: str
    kind: str
    """Of the configuration: `LoraConfig` for "Lora"."""
    options: dict[str, Any] = field(default_factory=dict)
    before: Action | None = None
    """Applied to the base model."""
    after: Action | None = None
    """Applied to the model with its adapter."""
    change: Callable[[Batch], Batch] | None = None
    """Applied to the batch."""
    random: bool = False
    """Whether the model draws random numbers in train mode."""
    single: bool = False
    """Whether the adapter is attached in float32, and its own temporaries are float32."""


def lora(**options: Any) -> dict[str, Any]:
    """Options of LoRA on the attention of Llama, unless others are given."""
    return {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **options}


def checkpointed(model: nn.Module) -> None:
    """Run layers again in the backward; the embedding is frozen, so that its output needs a gradient."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()


def second_active(model: nn.Module) -> None:
    """Add another adapter and train only that one."""
    from peft import LoraConfig

    model.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", **lora(r=2)))
    model.set_adapter("second")


def both_active(model: nn.Module) -> None:
    """Add another adapter and train the two together."""
    from peft import LoraConfig

    model.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", **lora(r=2)))
    model.base_model.set_adapter(["default", "second"])


def mixture(model: nn.Module) -> nn.Module:
    """X-LoRA over two adapters that were saved before."""
    from peft import LoraConfig, XLoraConfig, get_peft_model

    with tempfile.TemporaryDirectory() as folder:
        adapters = {name: f"{folder}/{name}" for name in ("0", "1")}  # X-LoRA knows them by these names only
        for path in adapters.values():
            get_peft_model(copy.deepcopy(model), LoraConfig(**lora(init_lora_weights=False))).save_pretrained(path)
        options: dict[str, Any] = {"hidden_size": model.config.hidden_size, "xlora_dropout_p": 0.0, "xlora_depth": 2}
        return get_peft_model(model, XLoraConfig(task_type="CAUSAL_LM", adapters=adapters, xlora_size=8, **options))


def tie(model: nn.Module) -> None:
    """Use the embedding as the head."""
    model.config.tie_word_embeddings = True
    model.tie_weights()


def unhooked(model: nn.Module) -> None:
    """Remove the gradient hooks of all parameters, as the clipper asks."""
    for parameter in model.parameters():
        parameter._backward_hooks = None


def of_tasks(batch: Batch) -> Batch:
    """Each example has the number of its task."""
    return {**batch, "task_ids": torch.tensor([0, 1, 1, 0])}


def invoke(batch: Batch) -> Batch:
    """Put the invocation tokens into each text."""
    ids = batch["input_ids"].clone()
    ids[:, 0:2] = torch.tensor(INVOCATION)
    return {**batch, "input_ids": ids}


BLOCKS = {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj", "k_proj", "v_proj"], "nblocks": 2}
LORA = [
    Setup("LoRA", "llama", "Lora", lora()),
    Setup("LoRA, all linear layers", "qwen3", "Lora", lora(target_modules="all-linear")),
    Setup("LoRA, all linear layers", "gemma3_text", "Lora", lora(target_modules="all-linear")),
    Setup("LoRA, fan_in_fan_out", "gpt2", "Lora", lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    Setup("LoRA, classification", "bert", "Lora", lora(target_modules=BERT)),
    Setup("LoRA, classification", "roberta", "Lora", lora(target_modules=BERT)),
    Setup("LoRA, encoder-decoder", "t5", "Lora", lora(target_modules=T5)),
    Setup("LoRA, classifier saved", "vit", "Lora", lora(target_modules=ATTENTION, modules_to_save=["classifier"])),
    Setup("LoRA, projections", "mamba", "Lora", lora(target_modules=["in_proj", "x_proj"])),
    Setup("LoRA, attention", "mixtral", "Lora", lora()),
    Setup("LoRA, stacked experts", "mixtral", "Lora", lora(target_modules=["q_proj"], target_parameters=EXPERTS)),
    Setup("LoRA, stacked experts", "qwen3_moe", "Lora", lora(target_modules=["q_proj"], target_parameters=EXPERTS)),
    Setup("LoRA, router", "qwen3_moe", "Lora", lora(target_modules=[], target_parameters=["mlp.gate.weight"])),
    Setup("LoRA, dropout 0.5", "llama", "Lora", lora(lora_dropout=0.5), random=True),
    Setup("LoRA, bias lora_only", "bert", "Lora", lora(target_modules=BERT, bias="lora_only")),
    Setup("LoRA, bias all", "bert", "Lora", lora(target_modules=BERT, bias="all")),
    Setup("LoRA, lora_bias", "llama", "Lora", lora(lora_bias=True)),
    Setup("LoRA, embedding", "llama", "Lora", lora(target_modules=["embed_tokens", "q_proj"])),
    Setup("LoRA, tied embedding", "gpt2", "Lora", lora(target_modules=["wte", "c_attn"], fan_in_fan_out=True)),
    Setup("LoRA, positions", "gpt2", "Lora", lora(target_modules=["wpe"])),
    Setup("LoRA, head", "llama", "Lora", lora(target_modules=["lm_head", "q_proj"])),
    Setup("LoRA, convolution", "vit", "Lora", lora(target_modules=[*PATCHES, *ATTENTION])),
    Setup("LoRA, embedding and head saved", "llama", "Lora", lora(modules_to_save=["embed_tokens", "lm_head"])),
    Setup(
        "LoRA, tied embedding and head saved",
        "qwen3",
        "Lora",
        lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        before=tie,
    ),
    Setup("LoRA, trainable tokens", "llama", "Lora", lora(trainable_token_indices=TOKENS)),
    Setup(
        "LoRA, trainable tokens, tied", "gpt2", "Lora", lora(target_modules=["c_attn"], trainable_token_indices=TOKENS)
    ),
    Setup("LoRA, rank by layer", "llama", "Lora", lora(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3})),
    Setup("LoRA, layers replicated", "llama", "Lora", lora(layer_replication=[[0, 2], [0, 2]])),
    Setup("LoRA, checkpoints", "llama", "Lora", lora(), after=checkpointed),
    Setup("LoRA, two adapters, one active", "llama", "Lora", lora(), after=second_active),
    Setup("LoRA, two adapters, both active", "llama", "Lora", lora(), after=both_active),
    Setup("rsLoRA", "llama", "Lora", lora(use_rslora=True)),
    Setup("LoRA, init PiSSA", "llama", "Lora", lora(init_lora_weights="pissa"), single=True),
    Setup("LoRA, init OLoRA", "llama", "Lora", lora(init_lora_weights="olora"), single=True),
    Setup("LoRA, init orthogonal", "llama", "Lora", lora(init_lora_weights="orthogonal")),
    Setup("LoRA, MiCA", "llama", "Lora", lora(init_lora_weights="mica"), single=True),
    Setup("DoRA", "llama", "Lora", lora(use_dora=True)),
    Setup("DoRA, dropout 0.5", "llama", "Lora", lora(use_dora=True, lora_dropout=0.5), random=True),
    Setup("DoRA, embedding", "llama", "Lora", lora(use_dora=True, target_modules=["embed_tokens"])),
    Setup("DoRA, convolution", "vit", "Lora", lora(use_dora=True, target_modules=PATCHES)),
    Setup("aLoRA", "llama", "Lora", lora(alora_invocation_tokens=INVOCATION), change=invoke),
    Setup("AdaLoRA", "llama", "AdaLora", {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": ATTENTION}),
    Setup("X-LoRA", "llama", "XLora", {}),
    Setup("KaSA", "llama", "Lora", lora(kasa_config=("KasaConfig", {})), single=True),
    Setup("BD-LoRA", "llama", "Lora", lora(use_bdlora=("BdLoraConfig", BLOCKS))),
    Setup("MonteCLoRA", "llama", "Lora", lora(monteclora_config=("MontecloraConfig", {})), random=True),
    Setup("VeLoRA", "llama", "Lora", lora(velora_config=("VeloraConfig", {"num_groups": 4, "init_type": "random"}))),
]


def on(**options: Any) -> dict[str, Any]:
    """Options of an adapter on the attention of Llama, unless other layers are given."""
    return {"target_modules": ATTENTION, **options}


IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
KRONECKER = {"target_modules": BERT, "r": 4, "decompose_both": True, "decompose_factor": 4}
OTHERS = [
    Setup("IA3", "llama", "IA3", {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}),
    Setup("IA3, feed-forward", "llama", "IA3", IA3),
    Setup("IA3, convolution", "vit", "IA3", {"target_modules": PATCHES, "feedforward_modules": []}),
    Setup("VeRA", "llama", "Vera", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    Setup("PVeRA", "llama", "Pvera", {"r": 4, "target_modules": ["q_proj", "o_proj"]}, random=True),
    Setup("LoHa", "llama", "LoHa", on(r=4)),
    Setup("LoHa, rank dropout 0.5", "llama", "LoHa", on(r=4, rank_dropout=0.5), random=True),
    Setup("LoHa, convolution", "vit", "LoHa", {"r": 4, "target_modules": PATCHES}),
    Setup("LoKr", "llama", "LoKr", on(r=2)),
    Setup("LoKr, both decomposed", "bert", "LoKr", KRONECKER),
    Setup("LoKr, convolution", "vit", "LoKr", {"r": 2, "target_modules": PATCHES}),
    Setup("OFT", "llama", "OFT", on(oft_block_size=4, r=0)),
    Setup("OFT, convolution", "vit", "OFT", {"oft_block_size": 4, "r": 0, "target_modules": PATCHES}),
    Setup("BOFT", "llama", "BOFT", on(boft_block_size=4)),
    Setup("BOFT, dropout 0.5", "llama", "BOFT", on(boft_block_size=4, boft_dropout=0.5), random=True),
    Setup("HRA", "llama", "HRA", on(r=4)),
    Setup("HRA, convolution", "vit", "HRA", {"r": 4, "target_modules": PATCHES}),
    Setup("FourierFT", "llama", "FourierFT", on(n_frequency=10, random_loc_seed=0), single=True),
    Setup("WaveFT", "llama", "WaveFT", on(n_frequency=10, random_loc_seed=0)),
    Setup("VB-LoRA", "llama", "VBLoRA", {"r": 2, "num_vectors": 12, "vector_length": 4, "target_modules": ["q_proj"]}),
    Setup("RandLoRA", "llama", "RandLora", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    Setup("MiSS", "llama", "Miss", on(r=4)),
    Setup("MiSS, Bone", "llama", "Miss", on(r=4, init_weights="bat")),
    Setup("C3A", "llama", "C3A", {"block_size": 8, "target_modules": ["q_proj", "o_proj"]}),
    Setup("SHiRA", "llama", "Shira", on(r=2, random_seed=0)),
    Setup("RoAd", "llama", "Road", on(group_size=8)),
    Setup("DeLoRA", "llama", "Delora", on(r=4)),
    Setup("GraLoRA", "llama", "Gralora", {"r": 4, "gralora_k": 2, "target_modules": ["q_proj", "o_proj"]}),
    Setup("HiRA", "llama", "Hira", on(r=4)),
    Setup("GLoRA", "llama", "Glora", on(r=4)),
    Setup("PSOFT", "llama", "Psoft", on(r=4), single=True),
    Setup("PEANuT", "llama", "Peanut", on(r=4)),
    Setup("DEFT", "llama", "Deft", on(r=4)),
    Setup("TinyLoRA", "llama", "TinyLora", on(u=4)),
    Setup("Uni-LoRA", "llama", "UniLora", on(r=4, theta_d_length=64)),
    Setup("Lily", "llama", "Lily", on(r=4, num_B=2, stride_A=1)),
    Setup("FRoD", "llama", "Frod", {"target_modules": ["q_proj", "o_proj"], "progressbar": False}),
    Setup("AdaMSS", "llama", "Adamss", on(r=4, num_subspaces=2, subspace_rank=1)),
    Setup("BEFT", "bert", "Beft", {"target_modules": ["value"]}),
    Setup("LN tuning", "bert", "LNTuning", {"target_modules": ["LayerNorm"]}),
    Setup("LN tuning", "llama", "LNTuning", {}),
    Setup("Super-tuning", "llama", "Supertuning", on()),
    Setup("OSF", "llama", "OSF", on(effective_rank=4)),
    Setup("OSF, gradient hooks removed", "llama", "OSF", on(effective_rank=4), after=unhooked),
    Setup("Shadow", "llama", "Shadow", {"r": 4, "shadow_dropout": 0.0}),
    Setup("BOFT, convolution", "vit", "BOFT", {"boft_block_size": 4, "target_modules": PATCHES}),
    Setup("Poly", "llama", "Poly", on(r=2, n_tasks=2, n_skills=2, n_splits=1), change=of_tasks, random=True),
    Setup("Trainable tokens", "llama", "TrainableTokens", {"token_indices": TOKENS}),
    Setup("Trainable tokens, tied", "gpt2", "TrainableTokens", {"token_indices": TOKENS, "target_modules": ["wte"]}),
    Setup("LLaMA-Adapter", "llama", "AdaptionPrompt", {"adapter_len": 3, "adapter_layers": 2}),
]
PROMPTS = [
    Setup("CPT", "llama", "CPT", {"cpt_token_ids": [5, 6, 7]}),
    Setup("CPT, gradient hook removed", "llama", "CPT", {"cpt_token_ids": [5, 6, 7]}, after=unhooked),
    Setup("Prompt tuning", "gemma3_text", "PromptTuning", {"num_virtual_tokens": 3}),
    Setup("Prompt tuning", "gpt2", "PromptTuning", {"num_virtual_tokens": 3}),
    Setup("Prompt tuning", "bert", "PromptTuning", {"num_virtual_tokens": 3}),
    Setup("Prompt tuning", "t5", "PromptTuning", {"num_virtual_tokens": 3}),
    Setup("Prefix tuning", "llama", "PrefixTuning", {"num_virtual_tokens": 3}),
    Setup(
        "Prefix tuning, projected",
        "llama",
        "PrefixTuning",
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8},
    ),
    Setup("Prefix tuning", "t5", "PrefixTuning", {"num_virtual_tokens": 3}),
    Setup("Prefix tuning", "bert", "PrefixTuning", {"num_virtual_tokens": 3}),
    Setup("Cartridge", "llama", "Cartridge", {"num_virtual_tokens": 3}),
    Setup("P-tuning, MLP", "llama", "PromptEncoder", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    Setup(
        "P-tuning, LSTM",
        "llama",
        "PromptEncoder",
        {"num_virtual_tokens": 3, "encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"},
    ),
    Setup(
        "Multitask prompt tuning",
        "llama",
        "MultitaskPromptTuning",
        {"num_virtual_tokens": 3, "num_tasks": 2, "num_ranks": 2},
        change=of_tasks,
    ),
]
SETUPS = [*LORA, *OTHERS, *PROMPTS]
