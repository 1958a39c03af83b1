"""Changes that a model makes to its logits after the head are known or refused."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memsave.ghost import GhostClipper
from memsave.models.language import causal_lm_losses
from memsave.models.own_head import TRIAL_LENGTH
from memsave.models.stand_in import Change, StandIn
from tests.ghost.test_transformers import VOCABULARY, gpt2
from tests.models.test_language import gptj, losses_with, of, text
from tests.support.per_example_reference import by_clipper, by_loop

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("device")
chunked, whole = losses_with("chunked"), losses_with("logits")


def changed(change, **options):
    """GPT-2 with a change of the logits after the head."""

    class Changed(transformers.GPT2LMHeadModel):
        def __init__(self, config):
            super().__init__(config)
            self.scale = nn.Parameter(torch.tensor(3.0))
            self.register_buffer("fixed", torch.tensor(3.0))

        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.logits = change(self, found.logits)
            return found

    torch.manual_seed(0)
    model = Changed(gpt2().config)
    for key, value in options.items():
        setattr(model.config, key, value)
    return model.double().eval()


class Halved(torch.autograd.Function):
    """The identity, with half of the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


class Doubled(Halved):
    @staticmethod
    def forward(ctx, x):
        return x * 2.0


class DoubledWithGradient(Halved):
    @staticmethod
    def forward(ctx, x):
        with torch.enable_grad():
            return x * 2.0


def without_gradient(model, x):
    with torch.no_grad():
        return x * 2.0


def in_place(model, x):
    x[..., 20:] = -torch.inf
    return x


def hooked(model, x):
    if x.requires_grad:
        x.register_hook(lambda grad: 2 * grad)
    return x


ON_A_TEXT = "for real tokens the model's logits are not those of"
REFUSED = {  # name: (change, words)
    "a padded vocabulary, dropped": (lambda m, x: x[..., :20], "changed by `__getitem__`"),
    "dropped where it is long": (lambda m, x: x[..., :20] if x.shape[-1] > 20 else x, "changed by `__getitem__`"),
    "dropped by narrow": (lambda m, x: x.narrow(-1, 0, 3), "changed by `narrow`"),
    "a padded vocabulary, at minus infinity": (in_place, "changed by `__setitem__`"),
    "padded with minus infinity": (lambda m, x: F.pad(x, (0, 3), value=-torch.inf), "changed by `pad`"),
    "masked": (lambda m, x: x.masked_fill(x > 0, 0.0), "changed by `(gt|__gt__)`"),
    "a choice": (lambda m, x: torch.where(torch.tensor(True), x, 0.0), "changed by `where`"),
    "joined": (lambda m, x: torch.cat([x, x], -1), "changed by `cat`"),
    "shifted": (lambda m, x: x + 1.0, "changed by `add`"),
    "a learned scale": (lambda m, x: x * m.scale, "`mul` with a parameter"),
    "a learned scale on the left": (lambda m, x: m.scale * x, "`mul` with a parameter"),
    "a learned scale of one": (lambda m, x: x * (m.scale / m.scale), "`mul` with a Tensor"),
    "a buffer": (lambda m, x: x * m.fixed, "`mul` with a Tensor"),
    "a factor of no name": (lambda m, x: x * 0.7, "`mul` with 0.7, which is none of logit_scale"),
    "a division": (lambda m, x: 2.0 / x, "changed by `__rdiv__`"),
    "in place": (lambda m, x: x.mul_(2.0), "changed by `mul_`"),
    "a temperature": (lambda m, x: x.div(2.0, rounding_mode="floor"), "changed by `div`"),
    "tanh alone": (lambda m, x: x.tanh(), "changed by `tanh` otherwise than by a soft cap"),
    "a cap of no name": (lambda m, x: 5.0 * (x / 5.0).tanh(), "changed by `tanh` otherwise than by a soft cap"),
    "a cap of two numbers": (lambda m, x: 30.0 * (x / 2.0).tanh(), "changed by `tanh` otherwise than by a soft cap"),
    "no gradient": (lambda m, x: x.detach(), "changed by `detach`"),
    "data": (lambda m, x: x.data, "changed by `data`"),
    "half of the gradient": (lambda m, x: Halved.apply(x), "changed by `view_as`"),
    "a function of its own": (lambda m, x: Doubled.apply(x), "changed by `mul` .*grad enabled: False"),
    "a gradient of its own": (lambda m, x: DoubledWithGradient.apply(x), "gradient of `DoubledWithGradientBackward`"),
    "without gradient": (without_gradient, "changed by `mul` .*grad enabled: False"),
    "a hook": (hooked, "changed by `register_hook`"),
    "rounded to integers": (lambda m, x: x.to(torch.long), "changed by `to`"),
    "another tensor": (lambda m, x: torch.zeros(1, 1, VOCABULARY), "logits of Changed are not those of"),
    "one row alone": (lambda m, x: torch.cat([x[:1] * 2.0, x[1:]]) if len(x) > 1 else x, "changed by `__getitem__`"),
    "a limit of large values": (lambda m, x: x.clamp(max=1e3), "changed by `clamp`"),
    "a factor of no name by length": (lambda m, x: x * 30.0 if x.size(1) > 1 else x, "`mul` with 30, which is none"),
    "another number of examples": (lambda m, x: x * 2.0 if x.shape[0] > 1 else x, ON_A_TEXT),
    "the graph": (lambda m, x: x if x.grad_fn is not None else x * 1, "changed by `grad_fn`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unknown_changes_of_the_logits_are_refused_with_the_operation(name):
    change, words = REFUSED[name]
    model = changed(change, logit_scale=2.0, final_logit_softcapping=30.0)
    if name == "a factor of no name":
        assert whole(model, text()).isfinite().all()
    with pytest.raises(ValueError, match=rf"(?s)(?=.*head of Changed).*({words}).*; give head=\"logits\""):
        chunked(model, text())
    assert "forward" not in vars(model.lm_head)


KNOWN = {
    "nothing": lambda m, x: x,
    "casts": lambda m, x: x.contiguous().to(torch.float64).clone(),
    "a named factor": lambda m, x: x * 2.0,
    "a named divisor": lambda m, x: x / 2.0,
    "a named factor on the left": lambda m, x: 2.0 * x,
    "one": lambda m, x: x * 1,
    "a named cap": lambda m, x: 30.0 * torch.tanh(x / 30.0),
    "a named factor and a named cap": lambda m, x: torch.tanh(x * 2.0 / 30.0).mul(30.0),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_changes_of_the_logits_are_exact(name):
    model, batch = changed(KNOWN[name], logit_scale=2.0, final_logit_softcapping=30.0), text()
    model.scale.requires_grad_(False)
    for parameter in model.parameters():
        parameter.data *= 4  # so that the logits are not small
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, plain = chunked(model, batch), whole(model, batch)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=0)
    one, other = (torch.autograd.grad(each.square().sum(), parameters) for each in (ours, plain))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            torch.testing.assert_close(chunked(model, batch), plain, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m, x: x * 2.0 if m.training else x, ON_A_TEXT),
        (lambda m, x: F.dropout(x, 0.1, m.training), "changed by `dropout`"),
    ],
    ids=["factor", "dropout"],
)
def test_a_change_in_train_mode_only_is_refused(change, words):
    model = changed(change, logit_scale=2.0).train()
    with pytest.raises(ValueError, match=words):
        chunked(model, text())


def test_a_change_by_length_is_exact_or_refused():
    """It is refused if the length of the trial has another change."""

    def texts(length):
        ids = torch.randint(
            VOCABULARY, (2, length), generator=torch.Generator(torch.get_default_device()).manual_seed(0)
        )
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    model = changed(lambda m, x: x * 2.0 if x.shape[1] > 6 else x, logit_scale=2.0)
    for length in (7, 6):
        torch.testing.assert_close(chunked(model, texts(length)), whole(model, texts(length)), rtol=1e-10, atol=0)
    model = changed(lambda m, x: x * 2.0 if x.shape[1] > TRIAL_LENGTH else x, logit_scale=2.0)
    with pytest.raises(ValueError, match=ON_A_TEXT):
        chunked(model, texts(TRIAL_LENGTH + 1))


def test_logits_are_checked_in_evaluation_mode():
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, pytest.raises(ValueError, match="changed by `add`"):
            chunked(changed(lambda m, x: x + 1.0), text())


@pytest.mark.parametrize("kind", ["Inkling", "Inkling2"])
def test_a_model_that_removes_its_padded_vocabulary_is_refused(kind):
    model_class = getattr(transformers, f"{kind}ForCausalLM", None)
    if model_class is None:
        pytest.skip(f"this release of transformers has no {kind}")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 8, "n_routed_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 1}
    config = model_class.config_class(vocab_size=VOCABULARY, unpadded_vocab_size=20, **sizes, **heads)
    batch = text()
    batch["attention_mask"][:] = 1
    with pytest.raises(ValueError, match=rf"head of {kind}ForCausalLM .*give head=\"logits\""):
        chunked(model_class(config).eval(), batch)


def test_a_scaled_head_with_a_bias_is_refused():
    model = changed(lambda m, x: x * 2.0, logit_scale=2.0, tie_word_embeddings=False)
    model.lm_head = nn.Linear(16, VOCABULARY).double()
    with pytest.raises(ValueError, match=r"has a bias, and its logits are scaled by 2; give head"):
        chunked(model, text())
    capped = changed(lambda m, x: 30.0 * torch.tanh(x / 30.0), final_logit_softcapping=30.0)
    capped.lm_head = nn.Linear(16, VOCABULARY).double()
    torch.testing.assert_close(chunked(capped, text()), whole(capped, text()), rtol=1e-10, atol=0)


def test_the_trial_runs_once_and_changes_no_state():
    calls = []

    def change(model, logits):
        calls.append(model.training)
        torch.rand(1)  # also in eval mode
        return logits

    model, batch = changed(change).train(), text()
    model.scale.requires_grad_(False)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    torch.manual_seed(7)
    first = chunked(model, batch)
    clipper.backward(first)
    assert calls == [False] * 3 + [True]  # the head, with padding, without padding
    assert all(module.training for module in model.modules())
    torch.manual_seed(7)
    second = chunked(model, batch)  # the same dropout masks
    clipper.backward(second)
    assert calls == [False] * 3 + [True] * 2
    assert torch.equal(first, second)


def test_a_cap_under_an_outer_checkpoint_is_exact():
    model, batch = changed(KNOWN["a named cap"], final_logit_softcapping=30.0), text()
    model.scale.requires_grad_(False)
    norms, _ = by_loop(model, batch, whole, max_grad_norm=1.0)
    for passes in (1, 2):
        ours, _ = by_clipper(
            model, batch, lambda m, b: checkpoint(chunked, m, b, use_reentrant=False), max_grad_norm=1.0, passes=passes
        )
        torch.testing.assert_close(ours, norms, rtol=1e-9, atol=1e-12)


def test_a_cap_under_autocast_is_exact():
    model, batch = (
        changed(KNOWN["a named factor and a named cap"], logit_scale=2.0, final_logit_softcapping=30.0),
        text(),
    )
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        ours, plain = chunked(model.float(), batch), whole(model, batch)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)


def test_a_changed_configuration_is_tried_again():
    model, batch = of("Gemma2", num_key_value_heads=1, head_dim=8, final_logit_softcapping=30.0).eval(), text()
    for parameter in model.parameters():
        parameter.data *= 4
    for cap in (30.0, 2.0, None):
        model.config.final_logit_softcapping = cap
        torch.testing.assert_close(chunked(model, batch), whole(model, batch), rtol=1e-4, atol=1e-6)


def test_an_empty_batch_runs_no_trial():
    model, calls = gptj().double().eval(), []
    model.transformer.register_forward_pre_hook(lambda module, args: calls.append(len(calls)))
    for mask in (None, torch.zeros(0, 7, dtype=torch.long)):
        empty = torch.zeros(0, 7, dtype=torch.long)
        assert causal_lm_losses(model, empty, empty, attention_mask=mask).shape == (0,)
    assert len(calls) == 2
    chunked(model, text())
    assert len(calls) == 2 + 3 + 1


def test_fake_tensors_run_no_trial():
    with FakeTensorMode():
        model = of("Gemma2", num_key_value_heads=1, head_dim=8)
        ids = torch.zeros(2, 5, dtype=torch.long)
        batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        assert chunked(model, batch).shape == (2,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_change_within_rounding_of_the_dtype_is_accepted(dtype):
    steps = StandIn.of(torch.zeros(1, 2, 3, dtype=dtype), "the head", vocabulary=5)
    config = transformers.GPT2Config(final_logit_softcapping=30.0, logit_scale=0.7)
    capped = (steps * 0.7 / 30.0).tanh() * 30.0
    assert capped.change(config) == Change(0.7, 30.0)
    assert steps.float().change(config) == Change()
