"""Overrides arrive as they were meant: what is printed can be pasted, and what Hydra would misread is refused."""

import re
import shlex
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsave.config import ConfigError
from memsave.config.compose import compose
from memsave.config.overrides import LISTS, TEXTS, override, parse, several
from memsave.config.registry import options
from memsave.run import check_overrides

BRATS = ["experiment=brats_rev", "data=brats"]
PATHS = [
    "/my/data (new)/a=b",
    "/my/a,b (c)",
    "/my/#1",
    "/my/Gehirn Ä ß",
    '/my/it\'s "mine"',
    "/my/a;b&c|d!e*f?g<h>~",
    "/ends with \\",
    '/a\\"b',
    "/a\\,b",
    " /blanks/ ",
    "~/data",
    "$HOME/${x}",
    "[a]",
    "{a}",
    "choice(a)",
    "null",
    "true",
    "1e3",
    "/two\nlines",
]


@pytest.mark.parametrize("path", PATHS)
def test_what_is_printed_can_be_pasted(path):
    (text,) = shlex.split(override("data.root", path))
    assert compose([*BRATS, text]).data.root == path


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0$"), min_size=1))
def test_any_text_arrives(value):
    (text,) = shlex.split(override("data.root", value))
    assert parse(text).value() == value


@pytest.mark.parametrize("path", ["/my/BraTS2021", "../run/checkpoint", "C:/data", "a-b_c.d+e@f"])
def test_a_plain_path_needs_no_quotes(path):
    assert override("data.root", path) == f"data.root={path}"


@pytest.mark.parametrize("path", [path for path in PATHS if path not in ("null", "/ends with \\", "$HOME/${x}")])
def test_a_path_that_would_be_misread_is_answered_with_the_form_that_works(path):
    with pytest.raises(ConfigError, match="quote") as caught:
        check_overrides([*BRATS, f"data.root={path}"])
    (text,) = shlex.split(str(caught.value).partition("as in ")[2])
    assert parse(text).value() == path


def test_a_blank_that_the_shell_took_for_an_end_is_recognised():
    with pytest.raises(ConfigError, match=r"'data' cannot be read; if it is part of the preceding value") as caught:
        compose([*BRATS, "data.root=/my/brain", "data"])
    assert shlex.split(str(caught.value).partition("as in ")[2]) == ["data.root=/my/brain data"]


def test_names_of_modalities_are_quoted_one_by_one():
    with pytest.raises(ConfigError, match="quote the names") as caught:
        compose([*BRATS, "data.root=/x", "data.modalities=[t1 (a),Ä]"])
    (text,) = shlex.split(str(caught.value).partition("as in ")[2])
    assert compose([*BRATS, "data.root=/x", text]).data.modalities == ["t1 (a)", "Ä"]


@pytest.mark.parametrize("text", ["data.root=null", "data.root=", "data.root='/my/a,b'", "+data.root=/x", "budget=1e9"])
def test_what_is_read_as_it_is_meant_is_left_alone(text):
    assert not parse(text).is_sweep_override()


def test_of_several_values_only_what_a_person_named_may_be_one():
    assert several("data.root=/a,b").endswith("""as in 'data.root="/a,b"'""")
    assert several("memory=stored,auto").endswith("add -m to run one job for each")


def test_the_keys_of_texts_exist():
    groups = ("data", "model", "memory", "privacy", "trainer", "profiler")
    schemas = [(group, schema) for group in groups for schema in options(group).values()]
    known = {f"{group}.{each.name}" for group, schema in schemas for each in fields(schema)}
    assert {key for key in (*TEXTS, *LISTS) if not re.match(r"hydra\.(run|sweep)\.dir", key)} <= known
