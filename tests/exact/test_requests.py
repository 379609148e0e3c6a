"""A probe and its Fisher between other things: copies, threads, names, warnings, objects of another kind."""

import copy
import subprocess
import sys
import threading
import warnings

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


def test_a_copy_of_an_attached_probe_sees_the_same_fisher(net, data):
    probe = fv.Probe(net, "categorical")
    expected = probe.fisher(data[0]).to_dense()
    with probe:
        other = copy.deepcopy(probe)
    assert torch.allclose(other.fisher(data[0]).to_dense(), expected)
    assert not any(module._forward_hooks for module in net.modules())


def test_a_malformed_batch_does_not_change_the_paths_of_later_ones(net, data):
    probe = fv.Probe(net, "categorical")
    expected = fv.approximate(probe.fisher(data[0]), "kfac").to_dense()
    with pytest.raises(ValueError, match="logits"):
        probe.fisher(data[0][0]).norm()
    assert torch.equal(fv.approximate(probe.fisher(data[0]), "kfac").to_dense(), expected)


def test_threads_share_a_model_one_pass_at_a_time(net, data):
    expected = fv.Probe(net, "categorical").fisher(data[0]).to_dense()
    gaps = []

    def work():
        for _ in range(3):
            gaps.append(float((fv.Probe(net, "categorical").fisher(data[0]).to_dense() - expected).abs().max()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gaps == [0.0] * 12


ROWS = torch.ones(2, 3).double()


def test_the_spectrum_does_not_depend_on_what_was_asked_before(net, data):
    fisher = fv.Probe(net, "categorical").fisher(data[0])
    before = fisher.spectrum(20)
    fisher.to_dense()
    after = fisher.spectrum(20)
    assert len(before) == len(after) == 14
    assert torch.allclose(before, after)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda f: f.norm("fro", block="0"), "pair"),
        (lambda f: f.probe.fisher(torch.ones(2, 3).double(), kind="mc", generator=3), "Generator"),
        (lambda f: f @ dict.fromkeys(f.probe.parameters(), 1.0), "tensor"),
        (lambda f: fv.compare(f, ["kfac"], gradient=[1.0]), "gradient"),
        (lambda f: fv.compare(f, ["kfac"], gradient=torch.full((31,), torch.nan)), "NaN"),
        (lambda f: fv.approximate(f.probe, "kfac"), "Fisher"),
        (lambda f: fv.compare(f.to_dense()), "Fisher"),
        (lambda f: fv.cumulants(f.to_dense()), "Fisher"),
        (lambda f: fv.Probe(f.probe.model, "categorical", output="logits"), "output="),
        (lambda f: fv.Probe(f.probe.model, "gaussian", output=lambda z: z.x).forward(ROWS), "output="),
        (lambda f: f.sample("a", 2), "prior_precision"),
    ],
    ids=range(11),
)  # fmt: skip
def test_objects_of_another_kind_are_named(net, data, call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call(fv.Probe(net, "categorical").fisher(*data))


def test_samples_belong_to_sampled_labels(net, data):
    for kind in ("exact", "empirical"):
        with pytest.raises(ValueError, match="samples=3 belongs to kind='mc'"):
            fv.Probe(net, "categorical").fisher(*data, kind=kind, samples=3)


def test_vectors_are_real_and_switches_are_switches(net, data):
    fisher = fv.Probe(net, "categorical").fisher(data[0])
    v, kfac = torch.ones(31, dtype=torch.complex128), fv.approximate(fisher, "kfac")
    for call in (lambda: fisher @ v, lambda: fisher.quadratic(v), lambda: kfac @ v, lambda: kfac.solve(v, 0.1)):
        with pytest.raises(TypeError, match="complex"):
            call()
    with pytest.raises(TypeError, match="entrywise"):
        fv.approximate(fisher, "cw-ngd", entrywise="no")


class SideDoor(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last((x @ self.inner.weight).mean(1))


def test_paths_are_promises_until_a_first_pass():
    probe = fv.Probe(SideDoor(), "categorical")
    promised = "structured if the first pass confirms it"
    assert repr(probe).count(promised) == probe._repr_html_().count(promised) == 2
    probe.fisher(torch.ones(2, 5, 4)).norm()
    assert promised not in repr(probe)
    assert "generic: its forward did not run" in repr(probe)


class Deprecated(nn.Module):
    """Has an operation without a batching rule, parameters on the generic path, and a warning of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        warnings.warn("mine", DeprecationWarning, stacklevel=1)
        return self.last(self.inner(x)[0][:, -1])


FRESH = """
import warnings
import torch
import fisherviz as fv
from tests.exact.test_requests import Deprecated
torch.manual_seed(0)
warnings.simplefilter("always")
fisher = fv.Probe(Deprecated(), "categorical").fisher(torch.randn(4, 5, 3))
fisher.norm()
net = torch.nn.Sequential(torch.nn.Embedding(9, 3), torch.nn.Flatten(), torch.nn.Linear(9, 3))
plain = fv.Probe(net, "categorical")
plain.fisher(torch.randint(9, (5, 3))) @ torch.ones(plain.space.size)
"""


def test_what_torch_tells_its_developers_is_not_shown_and_the_models_own_warnings_are():
    told = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True).stderr
    assert "DeprecationWarning: mine" in told
    assert "performance drop" not in told
    assert "torch.jit.script" not in told
