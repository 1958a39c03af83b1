"""python -m memsave.predict and memsave.generate in several processes: the files and exit codes of one process."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("monai")

from memsave import generate, predict
from memsave.config.compose import compose, to_objects
from memsave.data import DataError
from memsave.data.text.own_records import OwnRecordsData
from memsave.experiment import make_model, make_task
from memsave.tasks.language.answering import TextAnswerer
from tests.support.processes import run_processes
from tests.support.released_texts import PEOPLE, PROMPT, model_of, task_of, tokenizer_of
from tests.support.tiny_configs import TINY_UNET


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    """(released model without training, folder of four phantoms)."""
    folder, data = tmp_path_factory.mktemp("unet"), tmp_path_factory.mktemp("data")
    config = to_objects(compose([*TINY_UNET, f"data.root={data}"]))
    torch.manual_seed(0)
    make_task(config, torch.device("cpu")).release(make_model(config)[0], folder / "model")
    return folder, next(path for path in data.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A released model of one's own records."""
    folder, tokenizer = tmp_path_factory.mktemp("writer"), tokenizer_of()
    data = OwnRecordsData(prompt=PROMPT, completion="{text}", max_length=40)
    task_of(data, tokenizer).release(model_of(tokenizer), folder / "model")
    return folder


def command(module, arguments):
    """(exit code, lines on standard error) of a command in this process."""
    told = io.StringIO()
    with redirect_stderr(told):
        code = module.main(arguments)
    return code, told.getvalue().splitlines()


def commands(given):
    return [command({"predict": predict, "generate": generate}[name], arguments) for name, arguments in given]


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()} if Path(folder).is_dir() else {}


def sources(phantoms, folder):
    """Inputs of four cases, one case, and four cases of which the second one is damaged."""
    cases = sorted(path for path in phantoms.iterdir() if path.is_dir())
    shutil.copytree(cases[0], folder / "one" / cases[0].name)
    shutil.copytree(phantoms, folder / "damaged")
    (file,) = (folder / "damaged" / cases[1].name).glob("*_t2.nii.gz")
    file.write_bytes(file.read_bytes()[:200])
    return {"all": phantoms, "one": folder / "one", "damaged": folder / "damaged"}


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.slow
def test_predictions_are_those_of_one_process(unet, tmp_path, count):
    model, phantoms = unet
    known = sources(phantoms, tmp_path)

    def given(folder):
        common = [f"checkpoint={model}", "device=cpu"]
        asked = [("predict", [*common, f"input={path}", f"output={folder / name}"]) for name, path in known.items()]
        return [*asked, ("predict", [*common, f"input={phantoms}", f"output={folder / 'bad'}", "window=[3,4]"])]

    alone = commands(given(tmp_path / "alone"))
    assert [code for code, _ in alone] == [0, 0, 1, 2]
    ranks = run_processes(count, commands, given(tmp_path / "several"))
    for number, (code, lines) in enumerate(alone):
        expected = [line.replace("/alone/", "/several/") for line in lines]
        assert ranks[0][number] == (code, expected)
        assert all(rank[number] == (code, []) for rank in ranks[1:])
    for name in (*known, "bad"):
        assert files_of(tmp_path / "several" / name) == files_of(tmp_path / "alone" / name)
    assert len(files_of(tmp_path / "several" / "damaged")) == 3 and "failed: " in " ".join(alone[2][1])


class Failing(TextAnswerer):
    """An answerer that cannot answer a batch with the prompt `fails`."""

    fails: list[int] | None = None

    def answer(self, inputs):
        if self.fails in inputs:
            raise DataError("this batch is damaged")
        return super().answer(inputs)


def failing_at(monkeypatch, fails):
    from memsave.tasks.language.generation import GenerationConfig

    def answerer(self, *parts, **known):
        found = Failing(*parts, **known)
        name, age = PEOPLE[fails]
        found.fails = list(found._tokens(f"{name} ({age}):")[0])
        return found

    monkeypatch.setattr(GenerationConfig, "answerer", answerer)


def failing_commands(given, fails):
    """The commands, of which the first one fails at the batch of the person `fails`."""
    with pytest.MonkeyPatch.context() as patch:
        failing_at(patch, fails)
        found = commands(given[:1])
    return found + commands(given[1:])


def answers(lines):
    return [line.partition("/")[0] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_answers_are_those_of_one_process(writer, tmp_path, count):
    rows = [json.dumps({"name": name, "age": age}) + "\n" for name, age in PEOPLE]
    (tmp_path / "a.jsonl").write_text("".join([*rows[:2], "no json\n", *rows[2:]]))
    (tmp_path / "one.jsonl").write_text(rows[0])

    def asked(folder, name, source="a"):
        files = [f"input={tmp_path / source}.jsonl", f"output={tmp_path / folder / name}"]
        return "generate", [f"model={writer}", *files, "batch_size=2", "device=cpu"]

    def given(folder):
        again, bad = asked(folder, "kept.jsonl"), asked(folder, "bad.txt")
        return [again, again, asked(folder, "out.csv"), asked(folder, "one.jsonl", "one"), bad]

    for fails in (1, 2, 4):
        for each in ("alone", "several"):
            shutil.rmtree(tmp_path / each, ignore_errors=True)
            (tmp_path / each).mkdir()
        alone = failing_commands(given("alone")[: 5 if fails == 2 else 1], fails)
        ranks = run_processes(count, failing_commands, given("several")[: len(alone)], fails)
        assert [code for code, _ in alone] == [2, 1, 1, 0, 2][: len(alone)]
        for number, (code, lines) in enumerate(alone):
            expected = [line.replace("/alone/", "/several/") for line in lines]
            assert ranks[0][number] == (code, expected)
            assert all(rank[number] == (code, []) for rank in ranks[1:])
        assert files_of(tmp_path / "several") == files_of(tmp_path / "alone")
        partial = tmp_path / "several" / "kept.jsonl.partial.jsonl"
        assert partial.exists() == (fails != 2)
        if fails != 2:
            assert partial.read_bytes().count(b"\n") - 1 == fails // 2 * 2
        else:
            assert any("continuing after 2 of 5 lines" in line for line in alone[1][1])


def torchrun(name, *arguments, **variables):
    """The completed process of two processes of a command."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [*program, "-m", f"memsave.{name}", *arguments, "device=cpu"], env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_torchrun_starts_two_processes_of_predict(unet, tmp_path):
    given = [f"checkpoint={unet[0]}", f"input={unet[1]}"]
    assert predict.main([*given, f"output={tmp_path / 'alone'}", "device=cpu"]) == 0
    (tmp_path / "transformers.py").write_text("raise ImportError")  # MONAI imports it if it can, which takes seconds
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = torchrun("predict", *given, f"output={tmp_path / 'several'}", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "several") == files_of(tmp_path / "alone") != {}
    assert done.stderr.count("segmented 4 of 4 cases") == 1 and done.stdout == ""
