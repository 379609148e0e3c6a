"""Where a report goes is checked before anything is drawn."""

from pathlib import Path

import pytest
import torch
from torch import nn

import fisherviz as fv


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.fixture
def data():
    return torch.randn(7, 3).double(), torch.randint(3, (7,))


def test_paths_are_checked_before_anything_is_drawn(net, data, tmp_path, monkeypatch):
    comparison = fv.compare(fv.Probe(net, "categorical").fisher(data[0]), ["kfac"])
    monkeypatch.setattr("fisherviz.report.page.pictures", lambda *given: pytest.fail("drawn"))
    file = tmp_path / "file"
    file.write_text("")
    cases: tuple = (
        (comparison.to_html, tmp_path, "is a directory; give the path of a file"),
        (comparison.to_html, file / "x.html", "cannot be written to"),
        (comparison.save, file, "is a file; give the path of a directory"),
        (comparison.save, file / "x", "cannot be written to"),
    )
    if Path("/proc").is_dir():  # where nothing can be made, not even by root
        cases += ((comparison.to_html, "/proc/x", "/proc/x cannot"), (comparison.save, "/proc/x", "/proc/x cannot"))
    for write, path, words in cases:
        with pytest.raises(ValueError, match=words):
            write(path)
    for write in (comparison.to_html, comparison.save, fv.load_comparison):
        with pytest.raises(TypeError, match="a path is a string or a Path, got int"):
            write(3)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
