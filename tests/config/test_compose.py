"""Every experiment composes, and every mistake raises a one-sentence error."""

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from memsave.config import ConfigError
from memsave.config.compose import compose, load, to_objects
from memsave.config.registry import conf_dir

EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
BRATS = "experiment=brats_rev"


FSDP = ["trainer.parallel=fsdp"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_starts_with_its_command(name):
    lines = (conf_dir() / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"  # Hydra reads it only on the first line
    command = f"# python -m memsave.run experiment={name}"
    assert lines[1].startswith(command)
    to_objects(compose([f"experiment={name}", *lines[1].removeprefix(command).split()]))


@pytest.mark.parametrize("memory", ["stored", "checkpoint", "reversible"])
def test_the_memory_option_sets_the_mode(memory):
    assert to_objects(compose([BRATS, f"memory={memory}"])).memory.mode == memory


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.stepz=3"], r"trainer\.stepz is not known; valid in trainer are steps, .*did you mean steps\?"),
        (["+trainer.stepz=3"], r"trainer\.stepz is not known.*did you mean steps\?"),
        (["trainer.optimizer.lrr=3"], r"valid in trainer\.optimizer are name, lr.*did you mean lr\?"),
        (["data.sizes=3"], r"data\.sizes is not known.*did you mean size\?"),
        (["trainer.steps=abc"], r"trainer\.steps: .*'abc'.*expected int, as in trainer\.steps=150"),
        (["data.size=[1,a]"], r"data\.size\[1\]: Value 'a'"),
        (["trainer.lr=3"], r"^trainer\.lr is not known \(did you mean trainer\.optimizer\.lr\?\)$"),
        (["lr=3"], r"did you mean trainer\.optimizer\.lr\?"),
        (["+lr=3"], r"did you mean trainer\.optimizer\.lr\?"),
        (["data.batch_size=3"], r"did you mean trainer\.batch_size\?"),
        (["epoch=3"], r"did you mean trainer\.epochs\?"),
        (["seed=3"], r"did you mean trainer\.seed or data\.seed\?"),
        (["trainer.budget=8GiB"], r"did you mean budget\?"),
        (["target_epsilon=3"], r"did you mean privacy\.target_epsilon of privacy=direct or ghost\?"),
        (["privacy=ghost", "target_epsilon=3"], r"did you mean privacy\.target_epsilon\?\)$"),
        (["experiment=gpt2_dp", "lr=3"], r"did you mean trainer\.optimizer\.lr or model\.lr\?"),
        (["data.layout=msd"], r"^data\.layout is not a key of data=phantom; it is a key of data=brats$"),
        (["data=phantom_full", "data.layout=msd"], r"is not a key of data=phantom_full;"),
        (
            ["data=brats", "data.cases=3"],
            r"key of data=brats; it is a key of data=mni_phantom, phantom, .* or phantom_s",
        ),
        (
            ["model.name=gpt2"],
            r"is not a key of model=rev_unet; it is a key of model=.*gpt2, .*rev_gpt2, .* or smol",
        ),
        (["data.sizes=3"], r"valid in data=phantom are kind, root"),
        (
            ["experiment=brats_rev_dp", "model=gpt2"],
            r"^experiment=brats_rev_dp sets model\.channels, which the chosen model does .*; give model=rev_unet",
        ),
        (["memory=storde"], r"memory=storde is not known; choose one of .*did you mean stored\?"),
        (["memmory=stored"], r"memmory is not known.*did you mean memory\?"),
        (["data=brats"], r"data\.root is not given.*data\.root=/my/BraTS2021"),
        (["trainer.steps=0"], r"trainer\.steps is 0; it must be at least 1"),
        (["trainer.optimizer.name=adam"], r"choose one of adamw, sgd \(did you mean adamw\?\)"),
        (["profiler.compare=[stores]"], r"profiler\.compare is 'stores'.*did you mean stored\?"),
        (["trainer.precision=half"], r"choose one of float32, bfloat16"),
        (["privacy.kind=ghost"], r"privacy\.kind is 'ghost'; choose one of none"),
        (["model.kind=foo"], r"model\.kind is 'foo'; choose one of rev_unet"),
        (["task=foo"], "task=foo is not known; choose one of"),
        (
            ["task=generation"],
            "is not compatible with data=phantom; give data=dart, documents, e2e, ",
        ),
        (
            ["model=small_gpt2"],
            "is not compatible with model=small_gpt2; give data=brats, mni_.* and model=custom, rev_unet or",
        ),
        (["privacy=ghost", "privacy.clipping=layers"], r"privacy\.clipping is 'layers'.*flat, automatic, per_layer"),
        (
            ["privacy=ghost", "privacy.clipping=per_layer", "privacy.passes=2"],
            r"privacy\.clipping=per_layer forms its sums in one pass; give privacy\.passes=auto",
        ),
        (["privacy=ghost", "privacy.memory_budget=much"], r"privacy\.memory_budget: 'much' is no size"),
        (["experiment=gpt2_dp", "model.head=fused"], r"model\.head is 'fused'; choose one of chunked, logits"),
        (["privacy=ghost", "privacy.passes=3"], r"privacy\.passes is 3; choose one of auto, 1, 2, direct"),
        (["privacy=ghost", "privacy.passes=1.5"], r"privacy\.passes: Value '1\.5'.*expected int \| str, as in"),
        (["privacy=ghost", "privacy.passes=null"], r"privacy\.passes: .*expected int \| str, as in"),
        (["privacy=ghost", "privacy.accountant=gdp"], "choose one of pld, prv, rdp"),
        (["privacy=ghost", "privacy.max_grad_norm=0"], "at least"),
        (["privacy=direct"], r"passes=direct processes one example at a time; give trainer\.micro_batch_size=1"),
        (
            ["privacy=direct", *FSDP, "trainer.micro_batch_size=1"],
            r"fsdp sums gradients before privacy\.passes=direct has",
        ),
        (
            ["memory=reversible", "memory.engine=fused", *FSDP],
            r"fused reads weights .* not gathered; give memory\.engine=",
        ),
        (["trainer.precision=float16", *FSDP], r"scales gradients that are whole; give bfloat16"),
        (["privacy=ghosts"], r"privacy=ghosts is not known; choose one of .*did you mean ghost\?"),
        (["trainer.micro_batch_size=0"], r"micro_batch_size is 0; it must be at least 1"),
        (["data.cache_bytes=-1"], "at least 0"),
        (["trainer.optimizer.lr=-1"], "at least 0"),
        (["trainer.optimizer.momentum=1"], "at most"),
        (["data.validation_fraction=0"], "at least 0.001 and at most 0.999"),
        (["data.crop_size=[16,16]"], "give three numbers"),
        (["model.expansion=0"], "at least 1"),
        (["trainer.patience=3"], "also give trainer.evaluate_every"),
        (["privacy=ghost", "trainer.patience=3", "trainer.evaluate_every=1"], "by private validation scores"),
        (["privacy=ghost", "trainer.precision=float16"], "give bfloat16"),
        (["trainer.ema=1"], "at most"),
        (["budget=much"], r"budget: 'much' is no size; give one such as 16GiB"),
        (["memory.anchor_every=0"], "at least 1"),
        (["memory=stored", "memory.anchor_every=2"], "is for memory=reversible"),
        (["foo"], "overrides have the form key=value"),
        (["foo=3"], "foo is not known"),
        (["trainer.steps=[1"], "cannot be read"),
    ],
)
def test_an_error_names_the_key_the_expected_value_and_the_closest_name(overrides, words):
    with pytest.raises(ConfigError, match=words) as caught:
        compose([BRATS, *overrides])
    assert "\n" not in str(caught.value)


def test_without_an_experiment_the_error_lists_all_of_them():
    with pytest.raises(ConfigError, match=r"no experiment is chosen.*brats_rev"):
        compose([])
    with pytest.raises(ConfigError, match=r"did you mean brats_rev\?"):
        compose(["experiment=brats_rew"])


def test_only_the_reversible_language_model_has_a_reversible_mode():
    with pytest.raises(ConfigError, match=r"model=small_gpt2 has no reversible mode; give .* or model=rev_gpt2"):
        compose(["experiment=gpt2_dp", "memory=reversible"])
    with pytest.raises(ConfigError, match="model=gpt2 has no reversible mode"):
        compose(["experiment=gpt2_dp", "model=gpt2", "memory=reversible"])
    reversible = ["experiment=gpt2_dp", "model=rev_gpt2", "memory=reversible"]
    assert to_objects(compose([*reversible, "profiler.compare=[stored,reversible]"])).model.kind == "rev_gpt2"
    with pytest.raises(ConfigError, match=r"memory\.anchor_every is for model=rev_unet"):
        compose([*reversible, "memory.anchor_every=2"])
    with pytest.raises(ConfigError, match=r"data\.root is not given.*data\.root=/my/e2e"):
        compose(["experiment=gpt2_dp_e2e"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=brats_rev", "model.blocks=[2,1,1]"],
        ["experiment=brats_rev_dp"],
        ["experiment=brats_rev_dp", "privacy=none"],
        ["experiment=gpt2_dp"],
        ["experiment=gpt2_dp", "privacy=none"],
        ["experiment=gpt2_dp", "model=rev_gpt2", "memory=reversible"],
    ],
)
def test_the_config_of_a_run_is_read_back(tmp_path, overrides):
    config = compose(overrides)
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    assert load(tmp_path / "config.yaml") == to_objects(config)


@pytest.mark.parametrize("passes", ["auto", 1, 2, "direct"])
def test_the_number_of_passes_keeps_its_type(tmp_path, passes):
    config = compose([BRATS, "privacy=ghost", f"privacy.passes={passes}", "trainer.micro_batch_size=1"])
    assert to_objects(config).privacy.passes == passes
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    assert load(tmp_path / "config.yaml").privacy.passes == passes


@pytest.mark.parametrize("text", ["[1, 2]", "a: 3", "{:", ""])
def test_a_file_that_is_not_a_config_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"is not the config of a run \(.*\); give the folder of a run"):
        load(tmp_path / "config.yaml")


def test_an_unknown_variation_is_named_before_the_budget_that_it_would_need():
    with pytest.raises(ConfigError, match=r"^vary=volum is not valid for task=segmentation; .*did you mean volume\?"):
        compose(["experiment=brats_rev", "vary=volum"])


def test_the_configs_of_these_tests_are_those_of_hydra_alone():
    """The tests compose the options of a config once (tests/support/quick.py)."""
    choices = ["experiment=gpt2_dp", "model=gpt2", "memory=checkpoint"]
    asked = [[*choices, "trainer.steps=3"], [*choices, "trainer.steps=4"], ["experiment=brats_rev"]]
    code = (
        "import sys; from memsave.config.compose import compose; print([compose(each) for each in eval(sys.argv[1])])"
    )
    done = subprocess.run([sys.executable, "-c", code, repr(asked)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([compose(each) for each in asked])
