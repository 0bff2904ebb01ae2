"""Hostile data sets, features, runs, options and adapters: every reader ends well, or in one line with nothing changed.

Some of what fuzz_data.py tries, with a fixed seed.
"""

import pytest
from fuzz_data import DataDriver, cases, selection
from hostile import Case
from hostile.data_sources import DATA_SOURCES

SEED, COUNT = 1, 16
CHOSEN = selection(SEED, COUNT)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with DataDriver(tmp_path_factory.mktemp("fuzz")) as driver:
        yield driver


def test_there_are_many_and_the_same_ones_every_time():
    assert len(set(cases(SEED))) == len(cases(SEED)) > 1300
    assert selection(SEED, COUNT) == CHOSEN
    assert all(len(CHOSEN[source]) == COUNT for source in DATA_SOURCES)
    kinds = {case.mutation.split(":")[0] for case in cases(SEED)}
    assert kinds == {"place", "blind", "json", "safetensors", "csv", "picture", "tar", "run", "yaml"}


@pytest.mark.parametrize("source", DATA_SOURCES)
def test_hostile_data(driver, source):
    """What is sound is read, else nothing would be learnt from the rest; of that nothing breaks a rule."""
    driver.codes.clear()
    assert driver.judge(Case(source, "", 0)) == []
    assert set(driver.codes) == {0}
    broken = {str(case): problems for case in CHOSEN[source] if (problems := driver.judge(case))}
    assert broken == {}
    if DATA_SOURCES[source].tool != "prepare_data":  # which lists bad rows and goes on
        assert driver.codes[2] > 3  # damage is noticed
