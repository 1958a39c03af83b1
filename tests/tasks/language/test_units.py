"""Persons as units in the language tasks: exact norms, splits, plans and runs on tables of one's own."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("transformers")

import transformers

from memsave.config.compose import compose, to_objects
from memsave.data.errors import DataError
from memsave.data.loader import Index
from memsave.data.text.dialogs import ChatData
from memsave.data.text.documents import DocumentsData
from memsave.data.text.labelled import LabelledData
from memsave.data.text.own_records import OwnRecordsData
from memsave.experiment import run_experiment
from memsave.planning.fake_step import fake_step
from memsave.planning.plan import fixed_sizes
from memsave.progress import Progress
from memsave.tasks.definition import definition_of
from memsave.tasks.language.adapters import Lora
from memsave.tasks.language.small_gpt2 import SmallGPT2, small_gpt2, train_tokenizer
from memsave.tasks.language.small_roberta import SmallRoberta, small_roberta, train_masked_tokenizer
from memsave.training.private import make_mechanism
from tests.support.units_alone import assert_units_exact

CPU = torch.device("cpu")
SIZES = {"layers": 2, "heads": 2, "width": 16, "positions": 60}
PERSONS = ["ada", "bo", "bo", "cy", "cy", "cy", "cy", "dan", "dan", "eve"]
TEXTS = [
    f"{name} came for the {number + 1}. time" + " and felt worse than before" * (number % 3)
    for number, name in enumerate(PERSONS)
]


@pytest.fixture(scope="module")
def tokenizers():
    texts = TEXTS * 4
    return {"causal": train_tokenizer(texts, size=330), "masked": train_masked_tokenizer(texts, size=400)}


def write(folder, kind):
    """A file with the texts in the form of a source; its path."""
    rows = [{"person": name, "text": text} for name, text in zip(PERSONS, TEXTS, strict=True)]
    for number, row in enumerate(rows):
        row["label"] = "good" if number % 2 else "bad"
        messages = [("user", "How are you?"), ("assistant", row["text"]), ("user", "Bye"), ("assistant", "Bye")]
        row["messages"] = [{"role": role, "content": content} for role, content in messages[: 2 + 2 * (number % 2)]]
        row |= {"prompt": row["person"], "completion": row["text"]}
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


SLOW = pytest.mark.slow
SOURCES = {
    "records": (["task=generation", "data.max_length=30", "task.generate=1"], "causal"),
    "documents": (["task=generation", "data.max_length=8", "data.max_chunks=3"], "causal"),
    "chat": (["task=dialog", "data.max_length=48", "data.max_rows=2", "task.new_tokens=4"], "causal"),
    "labelled": (["task=classification", "data.max_length=40", "model=small_roberta"], "masked"),
}


def config_of(path, kind, *overrides):
    own, _ = SOURCES[kind]
    common = ["experiment=text_dp", "model=small_gpt2", f"data={kind}", f"data.root={path}", "data.unit=person"]
    return to_objects(compose([*common, *own, "data.records_per_unit=3", *overrides]))


@pytest.mark.parametrize("kind", SOURCES)
def test_norms_and_clipped_sums_of_persons_are_exact(kind, tokenizers, tmp_path):
    torch.manual_seed(0)
    config, tokenizer = config_of(write(tmp_path, kind), kind), tokenizers[SOURCES[kind][1]]
    if kind == "labelled":
        config = config.changed({"task.label_words": ["time", "before"]})
    task = definition_of(config).training_task(CPU, tokenizer, progress=Progress(silent=True))
    if kind == "labelled":
        model = small_roberta(SmallRoberta(**SIZES), vocabulary=len(tokenizer))
    else:
        model = small_gpt2(SmallGPT2(**SIZES), tokenizer)
    assert task.unit == "one person: all records with the same value of person"
    assert 2 <= task.size == len(set(task.names)) < 5
    assert max(map(len, task.groups)) > 1
    if kind == "documents":
        assert task.load([Index(0, 0), Index(1, 1)])["input_ids"].dim() == 4  # persons, documents, chunks, tokens
    assert_units_exact(task, model.double().eval(), [Index(each, each) for each in range(task.size)])


def test_norms_are_exact_with_lora(tokenizers, tmp_path):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    config = config_of(write(tmp_path, "records"), "records", "data.unit_loss=sum")
    task = definition_of(config).training_task(CPU, tokenizers["causal"], progress=Progress(silent=True))
    model = Lora(rank=2).apply(small_gpt2(SmallGPT2(**SIZES), tokenizers["causal"])).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert_units_exact(task, model.eval(), [Index(each, each) for each in range(task.size)])


@SLOW
def test_norms_are_exact_in_an_encoder_decoder(tmp_path, tokenizers):
    tokenizer = tokenizers["causal"]
    parts = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in parts.items()}
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = {"vocab_size": len(tokenizer), "pad_token_id": pad, "eos_token_id": end, "decoder_start_token_id": end}
    more = {"bos_token_id": end, "forced_eos_token_id": None, "max_position_embeddings": 64}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **ids, **more, d_model=16))
    model.save_pretrained(tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    config = config_of(write(tmp_path, "records"), "records", "model=gpt2", f"model.name={tmp_path / 'bart'}")
    task = definition_of(config).training_task(CPU, tokenizer, progress=Progress(silent=True))
    indices = [Index(each, each) for each in range(task.size)]
    batch = task.load(indices)
    assert task.count_tokens(batch) == sum(task.count_tokens(task.load([each])) for each in indices)
    assert_units_exact(task, model.double().eval(), indices)


@pytest.mark.parametrize("kind", ["records", *(pytest.param(kind, marks=SLOW) for kind in list(SOURCES)[1:])])
def test_the_data_are_the_same_and_the_batches_are_not(kind, tokenizers, tmp_path):
    path, tokenizer = write(tmp_path, kind), tokenizers[SOURCES[kind][1]]
    words = ["task.label_words=[time,before]"] if kind == "labelled" else []
    other = [[], ["data.unit=null", "data.records_per_unit=null"], ["data.records_per_unit=2"], ["data.seed=3"]]
    tasks = []
    for overrides in other:
        definition = definition_of(config_of(path, kind, *words, *overrides))
        tasks.append(definition.training_task(CPU, tokenizer, progress=Progress(silent=True)))
    assert len({each.data_fingerprint for each in tasks}) == 1
    assert len({each.fingerprint for each in tasks[:3]}) == 3
    assert tasks[1].size > tasks[0].size


def test_the_mechanism_counts_persons(tokenizers, tmp_path):
    pytest.importorskip("opacus")
    changes = ["privacy.verify=false", "privacy.noise_multiplier=1.0", "privacy.accountant=rdp", "trainer.batch_size=2"]
    config = config_of(write(tmp_path, "records"), "records", *changes, "trainer.steps=2", "trainer.epochs=null")
    task = definition_of(config).training_task(CPU, tokenizers["causal"], progress=Progress(silent=True))
    found = make_mechanism(config, torch.nn.Linear(1, 1), task, progress=Progress(silent=True))
    assert found.size == task.size == len(set(task.names)) < task.task.size
    assert (found.sample_rate, found.delta) == (2 / task.size, task.size**-1.1)


@SLOW
def test_a_private_run_draws_persons_and_says_so(tmp_path):
    pytest.importorskip("opacus")
    pytest.importorskip("sacrebleu")
    sizes = ["model.layers=1", "model.heads=2", "model.width=16", "model.vocabulary=300", "model.positions=60"]
    sizes += ["model.records=40", "model.steps=1", "model.batch_size=4", f"model.cache={tmp_path / 'cache'}"]
    short = ["trainer.steps=2", "trainer.epochs=null", "trainer.batch_size=2", "trainer.micro_batch_size=1"]
    short += ["privacy.noise_multiplier=1.0", "privacy.accountant=rdp", "profiler.compare=[]", "task.beams=1"]
    short += ["trainer.evaluate_first=false"]
    config = config_of(write(tmp_path, "records"), "records", *sizes, *short)
    (tmp_path / "run").mkdir()
    result = run_experiment(config, tmp_path / "run", progress=Progress(silent=True))
    spent, people = result["privacy"], result["data"]["examples"]
    assert spent["size"] == people < 5 < result["data"]["units"]["records"]
    assert spent["sample_rate"] == 2 / people and spent["delta"] == people**-1.1
    assert (spent["unit"], spent["unit_key"]) == ("one person: all records with the same value of person", "person")
    statement = " ".join((tmp_path / "run" / "privacy.md").read_text().split())
    assert f"One person: all records with the same value of person. Each of {people} in training is one" in statement
    assert "If the data name one person in several ways" in statement
    content = json.loads((tmp_path / "run" / "checkpoint" / "state.json").read_text())
    assert content["identity"]["data.unit"] == "person"


@pytest.mark.parametrize("source", [OwnRecordsData, DocumentsData, ChatData, LabelledData])
def test_tables_without_a_person_in_each_line_are_refused(source, tmp_path):
    path = write(tmp_path, source.kind)
    made = source(root=str(path), unit="person")
    people = [{each.unit for each in part} for part in made.splits()]
    assert people[0] | people[1] == set(PERSONS) and not people[0] & people[1]
    made.held_out = str(path)
    with pytest.raises(DataError, match=r"has records of 'ada' and 4 others \(data\.unit\), who also have records in"):
        made.splits()
    made.held_out, made.unit = None, "persn"
    with pytest.raises(DataError, match=r"line 1, has no column persn, which data\.unit names.*did you mean person"):
        made.splits()
    made.unit = "person"
    path.write_text(path.read_text().replace('"person": "bo"', '"person": " "', 1))
    with pytest.raises(
        DataError, match=r"line 2, has an empty person, which data\.unit names: fill it in or delete the line"
    ):
        made.splits()


def test_files_without_columns_have_no_units(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(
        DataError, match=r"has \.txt files, in which data\.unit=person can name no column: give a table"
    ):
        DocumentsData(root=str(tmp_path), unit="person").splits()


@pytest.mark.parametrize(
    ("kind", "privacy"),
    [
        ("documents", "ghost"),
        *(pytest.param(kind, privacy, marks=SLOW) for kind in SOURCES for privacy in ("none", "ghost")),
    ],
)
def test_a_step_with_the_largest_units_is_planned(kind, privacy, tmp_path):
    sizes = ["model.layers=1", "model.heads=2", "model.width=16", "model.vocabulary=300", "model.positions=60"]
    own = [f"privacy={privacy}", "trainer.batch_size=4", "trainer.micro_batch_size=2"]
    config = config_of(write(tmp_path, kind), kind, *sizes, *own)
    definition = definition_of(config)
    batch = definition.training_batch(count=2, device=CPU)
    assert batch["input_ids"].shape[:2] == (2, 3)
    assert not definition.has_static_batches
    assert "2 at once" in fixed_sizes(config) and fixed_sizes(config).endswith("3 records a unit")
    assert definition.calibration_config()[0].data.records_per_unit == 2
    with FakeTensorMode():
        fake_step(config, device=CPU).run()
