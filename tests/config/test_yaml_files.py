"""Config files that a stranger may have written."""

import pytest

from memsave.config import ConfigError
from memsave.config.compose import load
from memsave.training.result import read_config

LINES = ["a0: &a0 [x, x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n".join(LINES), "it contains aliases"),  # a billion entries
        ("- " * 2000, "it is nested too deeply"),
        ("a: !!python/object/apply:os.system ['exit 1']", "could not determine a constructor"),
        ("a: '\0'", "special characters are not allowed"),
        ("schema_version: []", "schema_version"),
        ("task: 3", "is not the config of a run"),
    ],
)
def test_a_hostile_config_is_refused_in_one_sentence(tmp_path, text, words):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load(tmp_path / "config.yaml")
    assert isinstance(read_config(tmp_path), dict)
