"""Keys of units: values that no run can use are refused with one sentence."""

import pytest

from memsave.config import ConfigError
from memsave.config.compose import compose, to_objects
from memsave.data.units import UnitKeys, identity_of, unit_key, units_of

TEXT = ["experiment=text_dp", "data=documents", "data.root=/my/texts.csv"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.unit=a", "data.records_per_unit=0"], r"data\.records_per_unit is 0; it must be at least 1"),
        (["data.records_per_unit=3"], r"data\.records_per_unit is for data\.unit; name the column"),
        (["data.unit_loss=sum"], r"data\.unit_loss is for data\.unit"),
        (["data.unit=a", "data.unit_loss=max"], r"data\.unit_loss is 'max'; choose one of mean, sum"),
        (["data.unit=''"], r"data\.unit is empty; give the name of a column, or data\.unit=null"),
        (
            ["data.unit=a", "mode=plan", "budget=1GiB", "data.max_chunks=1"],
            r"data\.records_per_unit is null, so units have no largest size, which mode=plan needs; give",
        ),
        (
            ["data=visits", "task=generation", "data.unit=a"],
            r"data\.unit is not a key of data=visits; it is a key of data=.*records",
        ),
    ],
)
def test_values_that_no_run_can_use(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose([*TEXT, *overrides])


def test_units_of_a_config():
    config = to_objects(compose([*TEXT, "data.unit=person", "data.records_per_unit=2"]))
    assert units_of(config.data) is config.data and unit_key(config.data) == "person"
    assert units_of(to_objects(compose(TEXT)).data) is None and unit_key(UnitKeys()) is None
    assert unit_key(object()) is None
    assert identity_of(config.data) == {"data.unit": "person", "data.records_per_unit": 2}
    assert identity_of(UnitKeys()) == {"data.unit": None}
