"""What this and earlier versions saved still loads, with the same numbers; see `tests.results.saved`."""

import json
import shutil

import numpy as np
import pytest

from tests.results import saved

VERSIONS = sorted(path.name for path in saved.HERE.iterdir() if path.is_dir() and path.name[0].isdigit())


@pytest.fixture(params=VERSIONS)
def version(request, tmp_path):
    """A copy of what a version saved: loading may go on with it."""
    return shutil.copytree(saved.HERE / request.param, tmp_path / "saved")


@pytest.mark.parametrize("name", sorted(saved.NUMBERS))
def test_what_a_version_saved_loads_with_the_same_numbers(version, name):
    expected = json.loads((version / saved.EXPECTED).read_text())[name]
    found = saved.NUMBERS[name](version)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, str):
            assert found[key] == value
        else:
            np.testing.assert_allclose(found[key], value, rtol=1e-6)


def test_the_fixture_is_small_and_has_every_kind():
    for name in VERSIONS:
        files = [path for path in (saved.HERE / name).rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 100_000
        kinds = {path.name for path in files}
        assert {"comparison.json", "report.json", "checkpoint.pt", "kfac.safetensors", "runs.csv"} <= kinds
