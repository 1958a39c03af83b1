"""A reversible GPT-2: a causal language model whose activation memory does not depend on its depth.

    x1 = x2 = wte[ids] + wpe[positions]
    y1 = x1 + F(x2),  y2 = x2 + G(y1)        in each of n layers: F is attention, G the feed-forward network
    logits = LayerNorm(y1 + y2) wte'

as in the Reformer (Kitaev et al., ICLR 2020) and Reversible Vision Transformers (Mangalam et al., CVPR 2022). Both
halves of the stream have the width of the model and are concatenated in dimension 1: (B, 2T, d). Each branch begins and
ends with a LayerNorm. The gain of the last one starts at 1 / sqrt(n), so that a branch adds little for any weights, and
the rebuilt stream drifts little.

Importing this module registers the model with transformers' AutoConfig and AutoModelForCausalLM.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from memsave.models.memory import check_memory, run_blocks
from memsave.reversible import AdditiveCoupling, ReversibleSequence

MLP_RATIO = 4  # width of the feed-forward network relative to the model


class RevGPT2Config(PretrainedConfig):
    """Sizes, with the names of transformers; `hidden_size` must be a multiple of `num_attention_heads`."""

    model_type = "rev_gpt2"

    def __init__(
        self,
        vocab_size: int = 50257,
        max_position_embeddings: int = 1024,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        **options: Any,
    ):
        super().__init__(**options)
        self.vocab_size, self.max_position_embeddings = vocab_size, max_position_embeddings
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.initializer_range = num_attention_heads, initializer_range
        self.tie_word_embeddings = tie_word_embeddings


def post_norm(config: RevGPT2Config) -> nn.LayerNorm:
    """The LayerNorm at the end of a branch; `first_gain` is its initial weight."""
    norm: Any = nn.LayerNorm(config.hidden_size)
    norm.first_gain = config.num_hidden_layers**-0.5
    return norm


class Attention(nn.Module):
    """Causal self-attention between two LayerNorms: the branch F, (B, T, d) to (B, T, d)."""

    def __init__(self, config: RevGPT2Config, *, number: int):
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        if width % heads:
            raise ValueError(f"hidden_size is {width}, which is no multiple of the {heads} heads; give one that is")
        self.heads, self.number = heads, number
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.post_norm = post_norm(config)

    def forward(self, x: Tensor, *, bias: Tensor | None, cache: Cache | None) -> Tensor:
        """`bias` (B, 1, T, S) is added to the scores of the S keys, cached ones included; None means causal."""
        batch, length, width = x.shape
        split = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)  # (B, heads, T, d / heads) each
        if cache is not None:
            k, v = cache.update(k, v, self.number)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
        return self.post_norm(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))


class BoundAttention(nn.Module):
    """The attention of a layer with the mask and cache of one call of the model."""

    def __init__(self, attention: nn.Module, *, bias: Tensor | None, cache: Cache | None):
        super().__init__()
        self.attention, self.bias, self.cache = attention, bias, cache

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.attention(x, bias=self.bias, cache=self.cache)


class RevGPT2Layer(nn.Module):
    """The two branches of a coupling."""

    def __init__(self, config: RevGPT2Config, *, number: int):
        super().__init__()
        width = config.hidden_size
        self.attention: nn.Module = Attention(config, number=number)
        self.mlp: nn.Module = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, MLP_RATIO * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(MLP_RATIO * width, width),
            post_norm(config),
        )

    def coupling(self, *, bias: Tensor | None, cache: Cache | None) -> AdditiveCoupling:
        """The coupling for one call of the model."""
        return AdditiveCoupling(BoundAttention(self.attention, bias=bias, cache=cache), self.mlp)


class RevGPT2(PreTrainedModel, GenerationMixin):
    """The reversible GPT-2 with its head, tied to the embedding unless the config says otherwise.

    `memory` may be changed at any time and is not saved: "stored" keeps every activation, "checkpoint" the input of
    each layer, "reversible" the output of the last layer.
    """

    config_class = RevGPT2Config
    base_model_prefix = ""
    _tied_weights_keys = {"lm_head.weight": "wte.weight"}  # noqa: RUF012, as transformers has it
    _supports_sdpa = True

    def __init__(self, config: RevGPT2Config, *, memory: str = "stored"):
        super().__init__(config)
        width = config.hidden_size
        self.memory = memory
        self.wte = nn.Embedding(config.vocab_size, width)
        self.wpe = nn.Embedding(config.max_position_embeddings, width)
        self.layers = nn.ModuleList(RevGPT2Layer(config, number=number) for number in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    @property
    def memory(self) -> str:
        """What is kept between forward and backward: one of `MEMORY_MODES`."""
        return self._memory

    @memory.setter
    def memory(self, mode: str) -> None:
        self._memory = check_memory(mode)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) of input_ids (B, T), or of the last `logits_to_keep` of them.

        Args:
            input_ids: (B, T), the tokens after those in the cache.
            attention_mask: (B, S), including the tokens in the cache; zero at padding, which may be on either side.
                Positions are counted from the first token that is not padding.
            past_key_values: cache of the keys and values of earlier tokens, extended in place; only without gradients.
            use_cache: create such a cache and return it.
            logits_to_keep: 0 keeps all.
        """
        cache, training = past_key_values, torch.is_grad_enabled()
        if training and cache is not None:
            raise ValueError(
                "past_key_values is given while gradients are enabled; give whole texts, or use torch.no_grad()"
            )
        if use_cache and not training and cache is None:
            cache = DynamicCache(config=self.config)
        before = 0 if cache is None else cache.get_seq_length()
        positions, bias = self._positions_and_bias(input_ids, attention_mask, before=int(before))
        x = self.wte(input_ids) + self.wpe(positions)  # (B, T, d)
        sequence = ReversibleSequence(
            (each.coupling(bias=bias, cache=cache) for each in self.layers),  # type: ignore[operator]
            recompute=self.memory == "reversible",
        )
        first, second = run_blocks(sequence, torch.cat((x, x), dim=1), memory=self.memory).chunk(2, dim=1)
        hidden = self.norm(first + second)
        logits = self.lm_head(hidden[:, -logits_to_keep:])  # of all for 0
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _positions_and_bias(self, ids: Tensor, mask: Tensor | None, *, before: int) -> tuple[Tensor, Tensor | None]:
        """(positions (B, T), the attention bias (B, 1, T, S) or None if attention is causal without padding)."""
        length, device = ids.shape[1], ids.device
        if mask is None:
            mask = torch.ones(ids.shape[0], before + length, device=device, dtype=torch.long)
            if not before:
                return (mask.cumsum(1) - 1), None
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        key = torch.arange(before + length, device=device)
        query = key[before:, None]  # (T, 1)
        # a padding token attends to itself, because an empty softmax is 0 / 0
        seen = (key < query) & mask[:, None].bool() | (key == query)  # (B, T, S)
        dtype = self.wte.weight.dtype
        return positions, torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, -torch.inf)[:, None]

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.wte

    def get_output_embeddings(self) -> nn.Module:
        """The language-model head."""
        return self.lm_head

    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights, zero biases; the gain of each branch's last LayerNorm is 1 / sqrt(n)."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            nn.init.constant_(module.weight, getattr(module, "first_gain", 1.0))
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            nn.init.zeros_(bias)


AutoConfig.register("rev_gpt2", RevGPT2Config, exist_ok=True)
AutoModelForCausalLM.register(RevGPT2Config, RevGPT2, exist_ok=True)
