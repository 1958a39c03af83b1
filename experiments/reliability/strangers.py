"""Code that a stranger plants in the folder of a model or a run. No command may run it.

The planted code makes a file, the canary. The commands get the answer "y" on standard input, so that a question whether
to run the code counts as running it.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.reliability.forks import run
from experiments.reliability.fuzz import CANARY, Attack, Fixtures, _command, _judge, _killed

PLANTED: dict[str, Callable[[Path, Path, Fixtures], tuple[str, list[str]]]] = {}
"""By name: plants code in an empty folder, and returns (module, arguments) of the command."""


class Bomb:
    """A pickle of it makes the file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def _code(canary: Path) -> str:
    return f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n"


def planted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a function of PLANTED by its name."""
    PLANTED[function.__name__.replace("_", " ")] = function
    return function


def _model(place: Path, found: Fixtures) -> Path:
    folder = place / "model"
    shutil.copytree(found.language / "model", folder)
    (place / "in.jsonl").write_bytes(found.table[".jsonl"])
    return folder


def _change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def _generate(place: Path) -> tuple[str, list[str]]:
    return "memsave.generate", [f"model={place / 'model'}", f"input={place / 'in.jsonl'}", "output=out.jsonl"]


@planted
def pickled_weights_in_place_of_safetensors(place: Path, canary: Path, found: Fixtures) -> tuple[str, list[str]]:
    folder = _model(place, found)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(canary)))
    return _generate(place)


@planted
def pickled_weights_under_the_name_of_safetensors(place: Path, canary: Path, found: Fixtures) -> tuple[str, list[str]]:
    folder = _model(place, found)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(canary)))
    return _generate(place)


@planted
def a_class_of_the_folder_in_auto_map(place: Path, canary: Path, found: Fixtures) -> tuple[str, list[str]]:
    folder = _model(place, found)
    (folder / "evil.py").write_text(_code(canary))
    own = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    _change(folder / "config.json", auto_map=own, model_type="unheard_of", trust_remote_code=True)
    return _generate(place)


@planted
def a_model_of_the_folder_in_auto_map(place: Path, canary: Path, found: Fixtures) -> tuple[str, list[str]]:
    folder = _model(place, found)
    (folder / "evil.py").write_text(_code(canary))
    _change(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    return _generate(place)


@planted
def a_tokenizer_of_the_folder_in_auto_map(place: Path, canary: Path, found: Fixtures) -> tuple[str, list[str]]:
    folder = _model(place, found)
    (folder / "evil.py").write_text(_code(canary))
    own = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    _change(folder / "tokenizer_config.json", auto_map=own, tokenizer_class="Evil", trust_remote_code=True)
    return _generate(place)


@planted
def training_from_a_folder_with_auto_map(place: Path, canary: Path, found: Fixtures) -> tuple[str, list[str]]:
    a_class_of_the_folder_in_auto_map(place, canary, found)
    arguments = ["experiment=gpt2_dp", "model=gpt2", f"model.name={place / 'model'}", "data.records=40"]
    return "memsave.run", [*arguments, "data.held_out=4", "trainer.steps=1", "hydra.run.dir=out"]


@planted
def training_from_a_folder_with_a_tokenizer_in_auto_map(
    place: Path, canary: Path, found: Fixtures
) -> tuple[str, list[str]]:
    a_tokenizer_of_the_folder_in_auto_map(place, canary, found)
    arguments = ["experiment=gpt2_dp", "model=gpt2", f"model.name={place / 'model'}", "data.records=40"]
    return "memsave.run", [*arguments, "data.held_out=4", "trainer.steps=1", "hydra.run.dir=out"]


@planted
def an_own_class_in_the_folder(place: Path, canary: Path, found: Fixtures) -> tuple[str, list[str]]:
    folder = _model(place, found)
    (folder / "evil.py").write_text(_code(canary))
    (folder / "own_class.json").write_text(json.dumps({"target": "evil.Model"}))
    return _generate(place)


@planted
def an_own_class_that_is_a_function(place: Path, canary: Path, found: Fixtures) -> tuple[str, list[str]]:
    folder = _model(place, found)
    (folder / "own_class.json").write_text(json.dumps({"target": "os.system"}))
    return _generate(place)


@planted
def a_function_for_generation_in_the_folder(place: Path, canary: Path, found: Fixtures) -> tuple[str, list[str]]:
    folder = _model(place, found)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(_code(canary) + "def generate(*a, **k): pass\n")
    _change(folder / "generation_config.json", custom_generate=str(folder), trust_remote_code=True)
    return _generate(place)


@planted
def python_files_that_are_imported_at_the_start(place: Path, canary: Path, found: Fixtures) -> tuple[str, list[str]]:
    folder = _model(place, found)
    for name in ("sitecustomize.py", "usercustomize.py", "conftest.py", "__init__.py", "modeling.py", "setup.py"):
        (folder / name).write_text(_code(canary))
    return _generate(place)


@planted
def an_adapter_with_pickled_weights(place: Path, canary: Path, found: Fixtures) -> tuple[str, list[str]]:
    folder = _model(place, found)
    base = place / "base"
    shutil.copytree(found.language / "model", base)
    (folder / "model.safetensors").unlink()
    content = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "target_modules": ["c_attn"]}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(canary)))
    return _generate(place)


@planted
def an_adapter_whose_class_is_any_name(place: Path, canary: Path, found: Fixtures) -> tuple[str, list[str]]:
    an_adapter_with_pickled_weights(place, canary, found)
    _change(place / "model" / "config.json", architectures=["pipeline"])
    return _generate(place)


@planted
def an_adapter_with_code_of_its_base_model(place: Path, canary: Path, found: Fixtures) -> tuple[str, list[str]]:
    an_adapter_with_pickled_weights(place, canary, found)
    (place / "model" / "config.json").unlink()
    (place / "base" / "evil.py").write_text(_code(canary))
    own = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    _change(place / "base" / "config.json", auto_map=own, model_type="unheard_of")
    return _generate(place)


@planted
def an_adapter_with_its_own_mapping(place: Path, canary: Path, found: Fixtures) -> tuple[str, list[str]]:
    an_adapter_with_pickled_weights(place, canary, found)
    (place / "model" / "evil.py").write_text(_code(canary))
    mapping = {"base_model_class": "Model", "parent_library": "evil"}
    _change(place / "model" / "adapter_config.json", auto_mapping=mapping)
    return _generate(place)


@planted
def a_template_that_calls_python(place: Path, canary: Path, found: Fixtures) -> tuple[str, list[str]]:
    folder = _model(place, found)
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in ().__class__.__base__.__subclasses__() %}"
    attack += "{{ x.__init__.__globals__['os'].system('touch " + str(canary) + "') }}{% endfor %}"
    _change(folder / "tokenizer_config.json", chat_template=attack)
    _change(folder / "prompt.json", task="dialog")
    return _generate(place)


@planted
def a_pickle_as_metadata_of_a_sharded_checkpoint(place: Path, canary: Path, found: Fixtures) -> tuple[str, list[str]]:
    folder = _killed(found.language, place)
    (folder / "checkpoint" / "shards").mkdir()
    (folder / "checkpoint" / "shards" / ".metadata").write_bytes(pickle.dumps(Bomb(canary)))
    return "memsave.run", [f"trainer.resume={folder}"]


@planted
def pickles_under_the_names_of_a_checkpoint(place: Path, canary: Path, found: Fixtures) -> tuple[str, list[str]]:
    folder = _killed(found.unet, place)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        (folder / "checkpoint" / name).write_bytes(pickle.dumps(Bomb(canary)))
    return "memsave.run", [f"trainer.resume={folder}"]


@planted
def tags_in_the_config_of_a_run(place: Path, canary: Path, found: Fixtures) -> tuple[str, list[str]]:
    folder = _killed(found.unet, place)
    with (folder / "config.yaml").open("a") as file:
        file.write(f'evil: !!python/object/apply:os.system ["touch {canary}"]\n')
    return "memsave.run", [f"trainer.resume={folder}"]


@planted
def a_network_of_the_folder_of_a_run(place: Path, canary: Path, found: Fixtures) -> tuple[str, list[str]]:
    folder = _killed(found.unet, place)
    (folder / "evil.py").write_text(_code(canary))
    (place / "evil.py").symlink_to(folder / "evil.py")
    text = (folder / "config.yaml").read_text()
    start, end = text.index("\nmodel:"), text.index("\nmemory:")
    own = "\nmodel:\n  kind: custom\n  name: custom\n  target: evil.Net\n"
    (folder / "config.yaml").write_text(text[:start] + own + text[end:])
    shutil.rmtree(folder / "checkpoint")
    return "memsave.predict", [f"checkpoint={folder}", f"input={found.volumes}", "output=out"]


@planted
def a_network_in_the_config_of_a_model(place: Path, canary: Path, found: Fixtures) -> tuple[str, list[str]]:
    folder = place / "model"
    shutil.copytree(found.unet / "model", folder)
    (folder / "evil.py").write_text(_code(canary))
    (place / "evil.py").symlink_to(folder / "evil.py")
    content = {"kind": "custom", "target": "evil.Net", "_target_": "os.system"}
    _change(folder / "config.json", model=content, target="evil.Net", _target_="evil.Net")
    return "memsave.predict", [f"checkpoint={folder}", f"input={found.volumes}", "output=out"]


def try_code(name: str, *, place: Path, found: Fixtures) -> tuple[str, int | None, str | None]:
    """(what was attacked, exit code, what was wrong)."""
    place.mkdir(parents=True)
    canary = place / CANARY
    module, arguments = PLANTED[name](place, canary, found)
    command = replace(_command(place, module, *arguments, fixtures=found), stdin="y\ny\ny\n")
    ended = run(command)
    given = Attack(command, name, codes=(0, 1, 2), canary=canary)
    asked = "run the custom code" in ended.err + ended.out or "[y/N]" in ended.err + ended.out
    wrong = _judge(given, ended, before=None)
    return module, ended.code, wrong or ("it asks whether to run the code" if asked else None)
