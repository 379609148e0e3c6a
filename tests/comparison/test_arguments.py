"""What compare takes, says and shows while it works."""

import io
import sys

import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.support import progress


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.fixture
def data():
    return torch.randn(7, 3).double(), torch.randint(3, (7,))


class NamedAll(nn.Module):
    def __init__(self):
        super().__init__()
        self.all, self.rest = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.rest(self.all(x).tanh())


def test_a_layer_called_all_is_not_taken_for_the_whole_matrix(data):
    fisher = fv.Probe(NamedAll().double(), "categorical").fisher(data[0])
    exact, kfac = fisher.to_dense(), fv.approximate(fisher, "kfac").to_dense()
    comparison = fv.compare(fisher, ["kfac"], metrics=["relative_frobenius"])
    error = float((exact - kfac).norm() / exact.norm())
    assert comparison.summary().loc["kfac", "relative_frobenius"] == pytest.approx(error)
    assert set(comparison.frame["row"]) == {"all", "all (layer)", "rest"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": 3}, "methods="), ({"methods": [3]}, "method must be"), ({"methods": {"a": 3}}, "method must be"),
        ({"methods": []}, "no method"), ({"metrics": 3}, "metrics="), ({"metrics": [3]}, "of metrics, got 3 among"),
        ({"metrics": []}, "no metric"), ({"gradient": torch.ones(31, dtype=torch.complex128)}, "complex"),
    ],
    ids=str,
)  # fmt: skip
def test_compare_names_what_it_cannot_take(net, data, options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        fv.compare(fv.Probe(net, "categorical").fisher(data[0]), **options)


def test_a_fitted_approximation_of_other_parameters_or_another_scale_is_refused(net, data):
    fisher = fv.Probe(net, "categorical").fisher(data[0])
    wider = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with pytest.raises(ValueError, match=r"fitted kfac is of other parameters \(45 .*Fisher \(31"):
        fv.compare(fisher, [fv.approximate(fv.Probe(wider, "categorical").fisher(data[0]), "kfac")])
    summed = fv.Probe(net, "categorical").fisher(data[0], reduction="sum")
    with pytest.raises(ValueError, match="reduction 'sum' and the Fisher 'mean'"):
        fv.compare(fisher, [fv.approximate(summed, "kfac")])
    foof = fv.approximate(summed, "foof")
    assert fv.compare(fisher, [foof], metrics=["bytes"]).whole("bytes")["foof"] == foof.bytes


def test_the_summary_says_what_was_left_out(net, data):
    fisher = fv.Probe(net, "categorical").fisher(*data)
    comparison = fv.compare(fisher, ["kfac"], damping=0.1, gradient=torch.zeros(31).double())
    sentence = "directions are left out: the gradient is zero."
    assert comparison.notes == (sentence,)
    assert comparison.summary().attrs["notes"] == [sentence]
    assert "1 left out: see .notes" in repr(comparison)
    assert sentence in comparison._repr_html_()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_long_work_shows_progress_on_a_terminal_unless_turned_off(net, data, monkeypatch, shown, stream):
    monkeypatch.setattr(progress, "MOMENT", 0.0)
    monkeypatch.setattr("sys.stderr", stream())
    fisher = fv.Probe(net, "categorical").fisher(data[0])
    fv.compare(fisher, ["kfac"], progress=shown)
    fv.cumulants(fisher, progress=shown)
    text = sys.stderr.getvalue()
    assert [word in text for word in ("comparing", "cumulants")] == [shown and stream is Terminal] * 2


def test_short_work_shows_no_progress(net, data, monkeypatch):
    monkeypatch.setattr(progress, "MOMENT", 1e9)
    monkeypatch.setattr("sys.stderr", Terminal())
    fv.compare(fv.Probe(net, "categorical").fisher(data[0]), ["kfac", "diagonal"])
    assert "comparing" not in sys.stderr.getvalue()


@pytest.mark.parametrize("width", [8, 900])
def test_the_default_damping_can_be_solved_with_in_float32(width):
    """One direction has nearly all of the trace, so that a hundredth of the mean is lost beside it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(60, width), nn.Tanh(), nn.Linear(width, 3))
    x = torch.ones(40, 60) + 1e-3 * torch.randn(40, 60)
    fisher = fv.Probe(net, "categorical").fisher(x, torch.randint(3, (40,)))
    found = fv.compare(fisher, ["layer", "cw-ngd", "kfac", "ekfac"], metrics=["direction_cosine"], progress=False)
    size, trace = fisher.shape[0], fisher.norm("trace")
    share = 0.01 / size if width == 8 else 16 * torch.finfo(torch.float32).eps
    assert found.meta["damping"] == pytest.approx(share * trace)
    assert set(found.frame["method"]) == {"layer", "cw-ngd", "kfac", "ekfac"}
    left_out = [note for note in found.notes if "left out" in note]
    assert all(note.startswith("of single layers ") for note in left_out)  # which have no rows in so wide a network
