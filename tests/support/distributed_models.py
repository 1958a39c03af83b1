"""Small float64 models of every kind, their data and losses: trained in one process and in several."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EXAMPLES = 9
WIDTHS = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
UNET = {"channels": (4, 8), "blocks": 2, "expansion": 2}


def draw(*shape, seed=1):
    """Normal float64 numbers."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ids_of(vocabulary, length=6):
    """(EXAMPLES, length) token ids."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocabulary, (EXAMPLES, length), generator=generator)


def make_model(name) -> nn.Module:
    """The model with the same weights in every process, in eval mode."""
    import transformers

    torch.manual_seed(0)
    if name == "mlp":
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    elif name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=29, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        model = transformers.GPT2LMHeadModel(config)
    elif name == "llama_lora":
        import peft

        config = transformers.LlamaConfig(vocab_size=29, max_position_embeddings=8, num_key_value_heads=1, **WIDTHS)
        lora = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    elif name == "bert":
        config = transformers.BertConfig(vocab_size=29, max_position_embeddings=8, num_labels=3, **WIDTHS)
        model = transformers.BertForSequenceClassification(config)
    else:
        from memsave.models import ReversibleUNet3d

        model = ReversibleUNet3d(2, 3, **UNET, memory=name.removeprefix("unet_"))
    return model.double().eval()


def losses_of(name, model, rows) -> Tensor:
    """(B,) losses of these examples."""
    from memsave.models import causal_lm_losses

    if name == "mlp":
        return model(draw(EXAMPLES, 4)[rows]).sin().sum(1)
    if name in ("gpt2", "llama_lora"):
        ids = ids_of(29)[rows]
        return causal_lm_losses(model, ids, ids)
    if name == "bert":
        labels = torch.arange(EXAMPLES)[rows] % 3
        return F.cross_entropy(model(ids_of(29)[rows]).logits, labels, reduction="none")
    return model(draw(EXAMPLES, 2, 4, 4, 4)[rows]).square().flatten(1).mean(1)


MODELS = ("mlp", "gpt2", "llama_lora", "bert", "unet_stored", "unet_checkpoint", "unet_reversible")
