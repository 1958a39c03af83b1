"""Overrides: printed ones can be pasted into a shell, and values that Hydra would misread are refused."""

import re
import shlex
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsave.config import ConfigError
from memsave.config.compose import compose
from memsave.config.overrides import LISTS, TEMPLATES, TEXTS, literal, override, parse, several
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
def test_a_printed_override_can_be_pasted_into_a_shell(path):
    (text,) = shlex.split(override("data.root", path))
    assert compose([*BRATS, text]).data.root == path


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0$"), min_size=1))
def test_any_text_is_quoted_and_parsed_back(value):
    (text,) = shlex.split(override("data.root", value))
    assert parse(text).value() == value


@pytest.mark.parametrize("path", ["/my/BraTS2021", "../run/checkpoint", "C:/data", "a-b_c.d+e@f"])
def test_a_plain_path_needs_no_quotes(path):
    assert override("data.root", path) == f"data.root={path}"


@pytest.mark.parametrize("path", [path for path in PATHS if path not in ("null", "/ends with \\", "$HOME/${x}")])
def test_a_path_that_would_be_misread_is_refused_with_its_quoted_form(path):
    with pytest.raises(ConfigError, match="quote") as caught:
        check_overrides([*BRATS, f"data.root={path}"])
    (text,) = shlex.split(str(caught.value).partition("as in ")[2])
    assert parse(text).value() == path


def test_a_path_split_at_a_space_is_refused_with_its_quoted_form():
    with pytest.raises(ConfigError, match=r"'data' cannot be read; if it is part of the preceding value") as caught:
        compose([*BRATS, "data.root=/my/brain", "data"])
    assert shlex.split(str(caught.value).partition("as in ")[2]) == ["data.root=/my/brain data"]


def test_modalities_are_refused_with_each_name_quoted():
    with pytest.raises(ConfigError, match="quote the names") as caught:
        compose([*BRATS, "data.root=/x", "data.modalities=[t1 (a),Ä]"])
    (text,) = shlex.split(str(caught.value).partition("as in ")[2])
    assert compose([*BRATS, "data.root=/x", text]).data.modalities == ["t1 (a)", "Ä"]


@pytest.mark.parametrize("text", ["data.root=null", "data.root=", "data.root='/my/a,b'", "+data.root=/x", "budget=1e9"])
def test_an_unambiguous_override_is_accepted(text):
    assert not parse(text).is_sweep_override()


def test_only_for_keys_of_texts_several_values_may_be_one_quoted_value():
    assert several("data.root=/a,b").endswith("""as in 'data.root="/a,b"'""")
    assert several("memory=stored,auto").endswith("add -m to run one job for each")


@pytest.mark.parametrize(
    "template", ["{name} is", "{a}, {b}", '"{a}" said', "{{{a}}}", "{a} $", "x=[{a}", "null", "it's"]
)
def test_a_template_needs_no_quotes_for_hydra(template):
    base = ["experiment=text_dp", "data.root=/x", f"data.prompt={template}"]
    assert compose(base).data.prompt == template
    text = literal(base[-1])
    assert literal(text) == text
    assert parse(text).value() == template
    check_overrides(["-m", *base])


def test_a_template_in_quotes_for_hydra_is_read_without_them():
    assert compose(["experiment=text_dp", "data.root=/x", 'data.prompt="{a} is"']).data.prompt == "{a} is"


def test_a_template_split_at_a_space_is_refused_with_its_quoted_form():
    with pytest.raises(ConfigError, match=r"'is' cannot be read; if it is part of the preceding value") as caught:
        compose(["experiment=text_dp", "data.root=/x", "data.prompt={name}", "is"])
    assert shlex.split(str(caught.value).partition("as in ")[2]) == ["data.prompt={name} is"]


def test_the_listed_keys_of_texts_exist():
    groups = ("data", "task", "model", "memory", "privacy", "trainer", "profiler")
    schemas = [(group, schema) for group in groups for schema in options(group).values()]
    keys = {f"{group}.{each.name}" for group, schema in schemas for each in fields(schema)}
    assert {key for key in (*TEXTS, *LISTS, *TEMPLATES[:2]) if not re.match(r"hydra\.(run|sweep)\.dir", key)} <= keys


def test_null_is_no_template():
    head = ["task.objective=head", "task.template=null", "task.label_words=null"]
    found = compose(["experiment=roberta_dp_sst2", "data.root=/x", *head]).task
    assert (found.template, found.label_words) == (None, None)
