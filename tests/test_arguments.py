"""Arguments of the form key=value become the fields of a dataclass."""

from dataclasses import dataclass, field

import pytest
from omegaconf import MISSING

from memsave.arguments import ArgumentError, names_in, parse_arguments


@dataclass
class Options:
    folder: str = MISSING
    mask: str | None = None
    workers: int = field(default=2, metadata={"expects": "a number"})
    flips: bool = field(default=False, metadata={"expects": "true or false"})


def parse(*arguments):
    return parse_arguments(arguments, Options, example="folder=/my/folder")


def test_values_have_the_types_of_the_fields():
    assert parse("folder=/a", "workers=3", "flips=true") == Options("/a", None, 3, True)


def test_the_last_value_of_a_key_counts():
    assert parse("folder=/a", "folder=/b").folder == "/b"


@pytest.mark.parametrize("text", ["007", "1e5", "null", "/a: b", "${x}", "/a=b", "/my/scans, new (2)", "[1]", "ä"])
def test_text_is_kept_as_typed(text):
    assert parse(f"folder={text}", f"mask={text}") == Options(text, text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"folder is not given: name a folder, as in folder=/my/folder"),
        (["folder"], r"'folder' cannot be read: arguments have the form key=value, as in folder=/my/folder"),
        (["folder="], r"'folder=' cannot be read"),
        (
            ["folder=a", "flip=true"],
            r"flip is not known: the keys are folder, .*; did you mean flips\?",
        ),
        (["folder=a", "a.b=c"], r"a\.b is not known"),
        (["folder=a", "workers=many"], r"workers is 'many': give a number"),
        (["folder=a", "workers=[1"], r"workers is '\[1': give a number"),
        (["folder=a", "workers=${x}"], r"workers is '\$\{x\}': give a number"),
        (["folder=a", "flips=perhaps"], r"flips is 'perhaps': give true or false"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        parse(*arguments)


@pytest.mark.parametrize("text", ["[t1,t2]", "t1, t2", "['t1', \"t2\"]", "[t1,t2,]"])
def test_names_of_a_list(text):
    assert names_in(text) == ["t1", "t2"]
