"""What a fresh pair of eyes stumbled over: copies, threads, names, half precision, and objects of another kind."""

import copy
import threading

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("method", list(fv.approximations))
def test_half_precision_models_are_approximated_in_float32(net, data, dtype, method):
    fisher = fv.Probe(copy.deepcopy(net).to(dtype), "categorical").fisher(data[0].to(dtype))
    approximation = fv.approximate(fisher, method)
    double = fv.approximate(fv.Probe(copy.deepcopy(net), "categorical").fisher(data[0]), method).to_dense()
    v = torch.ones(31, dtype=dtype)
    assert torch.linalg.norm(approximation.to_dense().double() - double) < 0.05 * torch.linalg.norm(double)
    assert (approximation @ v).dtype == approximation.solve(v, 0.1).dtype == dtype


def test_layers_are_counted_once_and_none_is_refused(net, data):
    fisher = fv.Probe(net, "categorical").fisher(data[0])
    assert fv.cumulants(fisher, ["0", "0"]).error == fv.cumulants(fisher, ["0"]).error
    with pytest.raises(ValueError, match="no layer"):
        fv.cumulants(fisher, [])


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


def test_a_users_operator_of_the_wrong_size_is_named_at_once(net, data):
    class Wrong(fv.Approximation):
        """Too small."""

        def statistics(self, layer):
            return {}

        def operator_for(self, layer, values):
            return torch.eye(2)

    with pytest.raises(TypeError, match=r"Wrong.operator_for\('0'\) must return an Operator of size 16 x 16"):
        fv.approximate(fv.Probe(net, "categorical").fisher(data[0]), Wrong)


def test_parameters_of_several_types_are_refused_by_name(net):
    net[2].float()
    with pytest.raises(ValueError, match="several types"):
        fv.Probe(net, "categorical")
