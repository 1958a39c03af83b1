"""A sample of the classes that `python -m experiments.models` tries, through the same code."""

import pytest

transformers = pytest.importorskip("transformers")

from experiments.models.check import Row, check  # noqa: E402
from experiments.models.table import summary, told  # noqa: E402

SAMPLE = [
    ("gpt2", "GPT2LMHeadModel", "causal language model"),
    ("qwen3", "Qwen3ForCausalLM", "causal language model"),
    ("bert", "BertForTokenClassification", "token classification"),
    ("t5", "T5ForConditionalGeneration", "text to text"),
    ("vit", "ViTForImageClassification", "image classification"),
    ("mixtral", "MixtralForCausalLM", "causal language model"),
    ("gpt_oss", "GptOssForCausalLM", "causal language model"),
    ("mamba2", "Mamba2ForCausalLM", "causal language model"),
    ("lfm2", "Lfm2ForCausalLM", "causal language model"),
    ("rwkv", "RwkvForCausalLM", "causal language model"),
    ("xlnet", "XLNetLMHeadModel", "causal language model"),
    ("deberta-v2", "DebertaV2ForMaskedLM", "masked language model"),
    ("bart", "BartForConditionalGeneration", "text to text"),
    ("clip", "CLIPForImageClassification", "image classification"),
    ("swin", "SwinForImageClassification", "image classification"),
    ("wav2vec2", "Wav2Vec2ForSequenceClassification", "audio classification"),
]
SLOW = {"t5", "rwkv", "gpt_oss", "lfm2", "xlnet", "clip", "swin"}
"""Checked by hand: the others have the same kinds of layers, and these take longest."""


@pytest.mark.parametrize(
    ("family", "name", "task"),
    [pytest.param(*each, marks=[pytest.mark.slow] if each[0] in SLOW else []) for each in SAMPLE],
)
def test_a_sample_is_exact(family, name, task):
    row = check(getattr(transformers, name), family, task)
    assert row.verdict == "exact" and row.apart and row.mode == "train", row


def test_a_model_that_mixes_examples_is_refused_in_train_mode():
    row = check(transformers.ResNetForImageClassification, "resnet", "image classification")
    assert row.verdict == "refused" and not row.apart and row.eval == "exact", row
    assert "(BatchNorm2d)" in row.message
    assert "for 2 reasons" not in told(row)


def test_a_class_that_cannot_be_built_is_not_tried():
    row = check(transformers.TimmWrapperForImageClassification, "nothing", "image classification")
    assert row.verdict == "not tried" and row.message


def test_the_summary_counts_by_task_and_in_all():
    rows = [Row("a", "A", "text to text", "exact"), Row("b", "B", "text to text", "wrong")]
    assert "| text to text | 1 | 0 | 0 | 1 | 0 |" in summary(rows)
    assert summary(rows).endswith("| all | 1 | 0 | 0 | 1 | 0 |")
