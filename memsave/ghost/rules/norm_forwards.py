"""The allow-list of RMSNorm forwards in transformers that return x_hat w or x_hat (1 + w).

transformers copies the same class into about 190 modules. A class is therefore recognised by the code of its forward,
not by its name: the compiled instructions, with the names of local variables, must equal those of a function below. The
functions are copied from transformers (Apache License 2.0); each docstring names one of the classes.
"""

import dis
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def llama(self: Any, hidden_states: Tensor) -> Tensor:
    """LlamaRMSNorm, and about 140 others."""
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)


def gpt_oss(self: Any, hidden_states: Tensor) -> Tensor:
    """GptOssRMSNorm."""
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return (self.weight * hidden_states).to(input_dtype)


def helium(self: Any, hidden_states: Tensor) -> Tensor:
    """HeliumRMSNorm."""
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return (self.weight.to(torch.float32) * hidden_states).to(input_dtype)


def t5(self: Any, hidden_states: Tensor) -> Tensor:
    """T5LayerNorm."""
    variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    if self.weight.dtype in [torch.float16, torch.bfloat16]:
        hidden_states = hidden_states.to(self.weight.dtype)
    return self.weight * hidden_states


def gemma(self: Any, x: Tensor) -> Tensor:
    """GemmaRMSNorm."""
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float())
    return output.type_as(x)


def muse_spark(self: Any, x: Tensor) -> Tensor:
    """MuseSparkTextCenteredRMSNorm."""
    output = self._norm(x.float())
    output = output * (1.0 + self.weight).float()
    return output.type_as(x)


def gemma3n(self: Any, hidden_states: Tensor) -> Tensor:
    """Gemma3nRMSNorm."""
    normed_output = self._norm(hidden_states.float())
    if self.with_scale:
        normed_output = normed_output * self.weight.float()
    return normed_output.type_as(hidden_states)


def moshi(self: Any, x: Tensor) -> Tensor:
    """MoshiRMSNorm."""
    output = self._norm(x.float())
    output = output * self.weight.float()
    return output.type_as(x)


def llama4(self: Any, x: Tensor) -> Tensor:
    """Llama4TextRMSNorm."""
    output = self._norm(x.float()).type_as(x)
    return output * self.weight


def norm_of_gemma(self: Any, x: Tensor) -> Tensor:
    """`_norm` of GemmaRMSNorm, MoshiRMSNorm and Llama4TextRMSNorm."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def norm_of_gemma3n(self: Any, hidden_states: Tensor) -> Tensor:
    """`_norm` of Gemma3nRMSNorm."""
    mean_squared = hidden_states.pow(2).mean(-1, keepdim=True) + self.eps
    return hidden_states * torch.pow(mean_squared, -0.5)


def norm_of_qwen4(self: Any, x: Tensor) -> Tensor:
    """`_norm` of Qwen4ExpTextRMSNorm, in groups of channels."""
    if self.group_size is not None:
        x = x.reshape(*x.shape[:-1], -1, self.group_size)
    out = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
    return out.flatten(-2) if self.group_size is not None else out


SCALED_BY_W = (llama, gpt_oss, helium, t5, gemma3n, moshi, llama4)
SCALED_BY_1_PLUS_W = (gemma, muse_spark)
NORMS = (norm_of_gemma, norm_of_gemma3n, norm_of_qwen4)


def known_neutral_weight(layer: nn.Module) -> float | None:
    """The weight for which the layer returns x_hat: 1 or 0; None if its forward is not in the allow-list."""
    forward: Any = type(layer).forward
    if set(dict(layer.named_parameters())) != {"weight"} or "_norm" in vars(layer):
        return None
    if hasattr(layer, "_norm") and not _is_among(NORMS, getattr(type(layer), "_norm", None)):
        return None
    if _is_among(SCALED_BY_W, forward):
        return 1.0
    return 0.0 if _is_among(SCALED_BY_1_PLUS_W, forward) else None


def _is_among(known: tuple[Callable[..., Any], ...], function: Any) -> bool:
    """Whether the function has the code of a known one, with the same `torch`."""
    code = getattr(function, "__code__", None)
    if code is None or function.__globals__.get("torch") is not torch or code.co_argcount != 2:
        return False
    instructions = _instructions(function)
    return any(instructions == _instructions(each) for each in known)


@functools.cache
def _instructions(function: Callable[..., Any]) -> list[tuple[str, str]]:
    """The bytecode without line numbers; both functions are compiled by the same Python, so no version matters."""
    found = dis.get_instructions(function)
    return [(each.opname, each.argrepr) for each in found if each.opname not in ("NOP", "RESUME", "CACHE")]
