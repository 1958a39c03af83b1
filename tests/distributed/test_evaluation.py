"""Evaluations shared by several processes: the scores, texts and files are exactly those of one process."""

import os

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sacrebleu")
pytest.importorskip("monai")

import transformers

from memsave.config.compose import compose, to_objects
from memsave.config.schema import TrainerConfig
from memsave.data import DataError
from memsave.data.text.calls import CallsData, private_dialogs
from memsave.data.text.config import VisitsData
from memsave.data.text.documents import Document, DocumentsData
from memsave.data.text.feedback import LABELS, private_comments
from memsave.data.text.records import Record
from memsave.data.text.templates import Template
from memsave.data.volumes.dataset import Volumes
from memsave.experiment import make_model, make_task
from memsave.processes import process_rank
from memsave.tasks.language import classifier, decoding, task
from memsave.tasks.language.classifier import Classification, Objective
from memsave.tasks.language.dialog import DialogConfig, DialogTask
from memsave.tasks.language.documents import Documents
from memsave.tasks.language.generation import Generation, GenerationConfig, PairGeneration
from tests.support.processes import run_processes
from tests.support.released_texts import KNOWN, model_of, tokenizer_of
from tests.support.tiny_configs import TINY_UNET

CPU = torch.device("cpu")
NAMES = ["Ada", "Bartholomew the younger one", "Cy", "Dee", "Eve of the old mill", "Fay", "Gus"]
RECORDS = [Record(f"{name} ({len(name)}):", f"{name} came on Monday with a cough. " * (n % 3 + 1)) for n, name in
           enumerate(NAMES)]  # fmt: skip


def bart(tokenizer):
    parts = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in parts.items()}
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = {"vocab_size": len(tokenizer), "pad_token_id": pad, "eos_token_id": end, "decoder_start_token_id": end}
    more = {"bos_token_id": end, "forced_eos_token_id": None, "max_position_embeddings": 64, "init_std": 0.5}
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **ids, **more, d_model=16))


def tasks(tokenizer):
    """(task, model) by name."""
    model, beams = model_of(tokenizer), GenerationConfig(beams=2)
    texts = [Document(each.completion * 4, each.prompt) for each in RECORDS]
    dialogs = private_dialogs(5, seed=1)
    classes = transformers.GPT2ForSequenceClassification(model.config)
    classes.config.pad_token_id = tokenizer.pad_token_id
    objective = Objective("head", Template("{text}", 40), LABELS, positive=1)
    comments = private_comments(31)
    trained = {"trainer": TrainerConfig(), "device": CPU}
    records, short = VisitsData(max_length=26), VisitsData(max_length=12)
    return {
        "generation": (Generation(RECORDS, RECORDS, tokenizer, data=records, task=beams, **KNOWN), model),
        "pairs": (PairGeneration(RECORDS, RECORDS, tokenizer, data=short, task=beams, **KNOWN), bart(tokenizer)),
        "documents": (Documents(texts, texts, tokenizer, data=DocumentsData(max_length=20), beams=1, **KNOWN), model),
        "dialog": (
            DialogTask(
                dialogs,
                dialogs,
                tokenizer,
                data=CallsData(max_length=60, max_rows=None),
                task=DialogConfig(new_tokens=6),
                **trained,
            ),
            model,
        ),
        "classification": (
            Classification(comments, comments, tokenizer, objective=objective, device=CPU),
            classes,
        ),
    }


def evaluated(folder, kind, batch):
    """(scores, the evaluation in full, the content of the files) of a language task; the files on rank 0."""
    decoding.BATCH = task.EVALUATION_BATCH = classifier.BATCH = batch
    given, model = tasks(tokenizer_of())[kind]
    scores = given.evaluate(model)
    return scores, repr(vars(given.evaluations[-1])), given.summary(scores), files_of(given, folder / kind)


def files_of(given, folder):
    if process_rank() != 0:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return {path.name: path.read_bytes() for path in given.show(folder)}


def all_evaluated(folder, batches):
    torch.set_printoptions(precision=17)
    return {(kind, each): evaluated(folder, kind, each) for kind, each in batches}


KINDS = ("generation", "pairs", "documents", "dialog", "classification")
BATCHES = [(kind, 2) for kind in KINDS] + [("classification", 7), ("generation", 32)]  # 32: one batch of all


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((decoding, "BATCH"), (task, "EVALUATION_BATCH"), (classifier, "BATCH")):
            patch.setattr(module, name, getattr(module, name))  # `evaluated` changes it
        return all_evaluated(tmp_path_factory.mktemp("alone"), BATCHES)


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.slow
def test_language_tasks_have_the_scores_and_files_of_one_process(alone, tmp_path, count):
    for rank, found in enumerate(run_processes(count, all_evaluated, tmp_path, BATCHES)):
        for key, expected in alone.items():
            assert found[key][:3] == expected[:3], key
            assert found[key][3] == (expected[3] if rank == 0 else None), key
    assert len(set(alone["generation", 2][1].split("', '"))) > 2  # different texts
    assert alone["generation", 2][1] != alone["generation", 32][1]  # the batches matter


def segmentation(folder, held_out, fails=None):
    """(scores, scores by case, files) of `held_out` of the four phantoms; case `fails` has no readable mask."""
    os.environ["MEMSAVE_CACHE"] = str(folder)
    config = to_objects(compose([*TINY_UNET, f"data.root={folder}"]))
    torch.manual_seed(0)
    model, _ = make_model(config)
    given = make_task(config, CPU)
    given.held_out = Volumes(given.cases[:held_out])
    if fails is not None:
        original = given.held_out.truth

        def truth(number):
            if number == fails:
                raise DataError(f"case {number} is damaged")
            return original(number)

        given.held_out.truth = truth
    scores = given.evaluate(model)
    files = files_of(given, folder / f"of {held_out}") if held_out > 1 else None
    return repr(scores), repr(given.scores), given.summary(scores), files


def several_segmentations(folder, most):
    """One case, `most` cases, and three cases of which the second one fails."""
    found = {held_out: segmentation(folder, held_out) for held_out in (1, most)}
    try:
        found["error"] = segmentation(folder, 3, fails=1)
    except DataError as error:
        found["error"] = str(error)
    return found


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return tmp_path_factory.mktemp("phantoms")


@pytest.mark.parametrize(("count", "most"), [pytest.param(2, 3, marks=pytest.mark.slow), (3, 4)])
@pytest.mark.slow
def test_segmentations_have_the_scores_and_files_of_one_process(phantoms, monkeypatch, count, most):
    monkeypatch.setenv("MEMSAVE_CACHE", "x")  # `segmentation` changes it
    alone = several_segmentations(phantoms, most)
    for rank, found in enumerate(run_processes(count, several_segmentations, phantoms, most)):
        for held_out in (1, most):
            assert found[held_out][:3] == alone[held_out][:3]
            assert found[held_out][3] == (alone[held_out][3] if rank == 0 else None)
        assert found["error"] == "case 1 is damaged" == alone["error"]
