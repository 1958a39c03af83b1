"""The files of conf/: compatible options compose, and so does every command in these files and in the documents."""

import re
import shlex
from itertools import cycle, islice
from pathlib import Path

import pytest

from memsave.config import registry
from memsave.config.compose import compose, to_objects
from memsave.config.registry import conf_dir
from memsave.data.text.config import TextData
from memsave.data.text.dialogs import DialogData
from memsave.data.text.labelled import ClassifiedData
from memsave.run import check_overrides
from memsave.tasks.definition import definition_of, options_of

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
OTHER_PACKAGES = {"extending.md"}  # its experiment belongs to a user's package; see tests/test_extension.py


def options(group):
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def compatible_runs(experiment):
    """The fewest runs in which every option occurs that is compatible with the experiment."""
    config = to_objects(compose([f"experiment={experiment}", "data.root=/my/data"]))
    task, schemas = definition_of(config), registry.options("model")
    data, model = options_of("data", task.data_class), sorted(options_of("model", task.model_class), reverse=True)
    memory = [name for name in options("memory") if not (name == "auto" and config.vary)]
    privacy = [name for name in options("privacy") if not (name == "direct" and config.vary == "batch")]
    reversible = [name for name in model if getattr(schemas[name], "reversible", True)]
    count = max(map(len, (data, model, memory, privacy)))
    if re.fullmatch(r"(brats|gpt2|roberta)_.*_.*|.*_full", experiment) and experiment != "gpt2_dp_dialog":
        count = 1  # its task is that of a shorter name, which has all of them
    for row in islice(zip(*map(cycle, (data, model, memory, privacy))), count):
        found = dict(zip(("data", "model", "memory", "privacy"), row))
        if found["model"] == "custom":
            found["memory"] = "stored"  # the others depend on the class
        if found["memory"] == "reversible" and found["model"] not in reversible:
            found["model"] = reversible[0]
        yield [f"experiment={experiment}", *(f"{group}={name}" for group, name in found.items())]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.slow
def test_an_experiment_composes_with_every_compatible_option(experiment):
    for overrides in compatible_runs(experiment):
        more = ["budget=8GiB"] if "memory=auto" in overrides else []
        more += ["model.target=torch.nn.Identity"] if "model=custom" in overrides else []
        more += ["trainer.micro_batch_size=1"] if "privacy=direct" in overrides else []
        more += ["data.max_chunks=4"] if "data=documents" in overrides else []
        config = to_objects(compose([*overrides, *more, "data.root=/my/data"]))
        chosen = dict(each.split("=") for each in overrides)
        assert config.data.kind == chosen["data"].removesuffix("_full").removesuffix("_small"), overrides
        mode = chosen["memory"].replace("offload", "stored")  # it moves what is stored
        assert (config.memory.mode, config.privacy.option) == (mode, chosen["privacy"]), overrides
        assert bool(config.memory.offload) == (chosen["memory"] == "offload"), overrides


def commands():
    """(file, overrides) of each command in a file of conf/, in a document or in the help of the command line."""
    for path in sorted((conf_dir() / "experiment").glob("*.yaml")):
        for found in overrides_in(path):
            yield path.name, found if found[0].startswith("experiment=") else [f"experiment={path.stem}", *found]
    for path in sorted((conf_dir() / "data").glob("*.yaml")) + sorted((conf_dir() / "memory").glob("*.yaml")):
        for found in overrides_in(path):
            yield path.name, [f"experiment={experiment_for(found)}", *found]
    pages = [path for path in sorted(ROOT.glob("docs/*.md")) if path.name not in OTHER_PACKAGES]
    for path in [ROOT / "README.md", ROOT / "memsave" / "run.py", *pages]:
        for found in re.findall(r"python -m memsave\.run ((?:.*\\\n)*.*)", path.read_text()):
            words = shlex.split(found.replace("\\\n", " ").partition("`")[0], comments=True)
            yield path.name, [word for word in words if "=" in word]


def experiment_for(overrides):
    """An experiment that the overrides of a data set or a memory mode suit."""
    chosen = dict(each.partition("=")[::2] for each in overrides)
    data = registry.options("data").get(chosen.get("data"), object)
    if chosen.get("task") == "dialog" or issubclass(data, DialogData):
        return "gpt2_dp_dialog"
    if chosen.get("task") == "classification" or issubclass(data, ClassifiedData):
        return "roberta_dp"
    return "gpt2_dp" if issubclass(data, TextData) else "brats_rev"


def overrides_in(path):
    """Each group of adjacent overrides in the comment at the top of a file."""
    head = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    for found in re.findall(r"(?<![^ (])[a-z_.]+=[^ ]+(?: [a-z_.]+=[^ ]+)*", head):
        yield [word.rstrip(".,:;)") for word in found.split()]


COMMANDS = [each for each in commands() if len(each[1]) > 1 and not any("launcher" in word for word in each[1])]


@pytest.mark.parametrize("overrides", dict.fromkeys(tuple(found) for _, found in COMMANDS), ids=" ".join)
def test_a_documented_command_composes(overrides):
    made_up = [] if any(word.startswith("data.root=") for word in overrides) else ["data.root=/made/up"]
    check_overrides(["-m", *overrides, *made_up])


def test_the_documented_commands_are_found():
    files = {file for file, _ in COMMANDS}
    assert {"brats_rev.yaml", "brats_rev_dp.yaml", "gpt2_dp_e2e.yaml", "auto.yaml", "e2e.yaml", "run.py"} <= files
    assert ("brats_rev_dp.yaml", ["experiment=brats_rev_dp", "privacy=none"]) in COMMANDS
