"""privacy.memory_budget=auto: spare memory is spent, never more than there is, and never more than can be used."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from memsave.config import ConfigError
from memsave.config.compose import compose, load, to_objects
from memsave.ghost import GhostClipper, head, logits
from memsave.integrations.private_training import PrivacyArguments
from memsave.planning import kept
from memsave.planning.fake_step import fake_step
from memsave.planning.kept import SHARE, choose_kept
from memsave.privacy import PrivacyError
from memsave.profiler import parse_bytes, peak_on_fake
from memsave.progress import Progress
from tests.support.tiny_configs import TINY_GPT2_DP, TINY_UNET

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_logits(cache, monkeypatch):
    """Without a budget, no logits are kept."""
    monkeypatch.setattr(head, "KEPT", 0)
    monkeypatch.setattr(logits, "BLOCK", {"cpu": 20_000})  # 79 kB
    monkeypatch.setattr(logits, "MIN_COLUMNS", 1)


def config_of(*overrides):
    return to_objects(compose([*TINY_GPT2_DP, *overrides]))


def chosen(folder, *overrides, free=0):
    """(the config with the choice, what was printed)."""
    said = []
    progress = Progress(silent=True)
    progress.say = said.append
    config = choose_kept(config_of("privacy.memory_budget=auto", *overrides), folder, CPU, free=free, progress=progress)
    return config, said


def peak_of(config):
    return peak_on_fake(lambda: fake_step(config, device=CPU)).peak_bytes


@pytest.mark.parametrize(
    ("overrides", "free", "expected"),
    [
        (["budget=1000B"], 0, 300),
        (["budget=1200B"], 0, 400),  # what can be used
        (["budget=600B"], 0, 0),
        ([], 1000, 100),
    ],
)
def test_what_is_left_is_taken_up_to_what_can_be_used(overrides, free, expected, tmp_path, monkeypatch):
    search = SimpleNamespace(trial=lambda config: SimpleNamespace(need=SimpleNamespace(total=700)))
    monkeypatch.setattr(kept, "Search", lambda *_: search)
    monkeypatch.setattr(kept, "_usable", lambda *_: 400)
    config, said = chosen(tmp_path, *overrides, free=free)
    assert config.privacy.kept_bytes == expected
    assert len(said) == 1 and f"{expected} B of 400 B" in said[0]


@pytest.mark.slow
def test_the_rest_of_a_budget_is_spent_and_not_more(tmp_path):
    least = peak_of(config_of())
    budget = least + 200_000
    config, said = chosen(tmp_path, f"budget={budget}B")
    assert config.privacy.kept_bytes == 200_000  # the tiny calibration adds nothing on the CPU
    assert least < peak_of(config) <= budget
    assert len(said) == 1 and said[0].startswith("privacy.memory_budget=auto: 195.31 KiB of ")
    assert load(tmp_path / "config.yaml").privacy.memory_budget == "200000B"


@pytest.mark.slow
def test_no_more_is_taken_than_can_be_used(tmp_path):
    config, _ = chosen(tmp_path, free=2**36)
    everything = peak_of(config_of("privacy.memory_budget=64GiB"))
    assert 0 < config.privacy.kept_bytes < 2**21
    assert peak_of(config) == everything > peak_of(config_of())


@pytest.mark.slow
def test_a_unet_with_a_fixed_mode_keeps_what_is_left(tmp_path):
    pytest.importorskip("monai")
    private = ["privacy=ghost", "privacy.noise_multiplier=1.0", "trainer.micro_batch_size=1", "budget=1GiB"]
    config = to_objects(compose([*TINY_UNET, "memory=stored", "privacy.memory_budget=auto", *private]))
    found = choose_kept(config, tmp_path, CPU, free=0, progress=Progress(silent=True))
    assert isinstance(found.privacy.kept_bytes, int)


@pytest.mark.slow
def test_a_share_of_the_free_memory_is_spent_without_a_budget(tmp_path):
    least = peak_of(config_of())
    config, _ = chosen(tmp_path, free=int((least + 200_000) / SHARE) + 1)
    assert abs(config.privacy.kept_bytes - 200_000) <= 1
    assert chosen(tmp_path, free=least)[0].privacy.kept_bytes == 0


def test_the_largest_size_leaves_nothing(tmp_path):
    config, said = chosen(tmp_path, "budget=1GiB", "vary=batch", "mode=plan")
    assert config.privacy.kept_bytes == 0 and "vary=batch" in said[0]


def test_a_number_is_left_as_it_is(tmp_path):
    config = config_of("privacy.memory_budget=1MiB")
    assert choose_kept(config, tmp_path, CPU, free=0, progress=Progress(silent=True)) is config
    assert config.privacy.kept_bytes == parse_bytes("1MiB")


def test_auto_is_refused_where_no_step_is_planned():
    with pytest.raises(ConfigError, match=r"memory_budget=auto is for ghost norms"):
        config_of("privacy.passes=direct", "privacy.memory_budget=auto", "trainer.micro_batch_size=1")
    with pytest.raises(ValueError, match=r"memory_budget is 'auto'; give a number of bytes"):
        GhostClipper(torch.nn.Linear(2, 2), max_grad_norm=1.0, memory_budget="auto")
    with pytest.raises(PrivacyError, match=r"memory_budget is 'auto'; give a number of bytes"):
        PrivacyArguments(target_epsilon=1.0, memory_budget="auto")
