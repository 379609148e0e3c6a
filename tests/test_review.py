"""What a fresh pair of eyes stumbled over: copies, threads, names, half precision, and objects of another kind."""

import copy
import io
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import fisherviz as fv
from fisherviz.operators import Identity
from fisherviz.support import progress


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


# ---- authors of approximations ---------------------------------------------------------------------------------------


def author(**methods):
    """An approximation with methods of its own over a complete one's."""
    complete = {"statistics": lambda self, layer: {}, "operator_for": lambda self, layer, values: Identity(layer.size)}
    return type("Mine", (fv.Approximation,), {"__doc__": "Mine.", **complete, **methods})


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ({"operator_for": lambda self, layer, values: values["zz"]}, r"Mine.operator_for\('0'\).*KeyError: 'zz'"),
        ({"operator_for": lambda self, layer, values: layer.nothing}, r"Mine.operator_for\('0'\).*AttributeError"),
        ({"statistics": lambda self, layer: [][0]}, r"Mine.statistics\('0'\).*IndexError"),
        ({"statistics": lambda self, layer: {"a": 3}}, r"Mine.statistics\('0'\).*name -> Statistic, got int"),
        ({"statistics": lambda self, layer: None}, r"Mine.statistics\('0'\).*name -> Statistic, got NoneType"),
        ({"pairs": lambda self, layers, adjacent: layers[9]}, r"Mine.pairs.*IndexError"),
        ({"operator_for": lambda self, layer, values: Identity(3)}, r"Mine.operator_for\('0'\).*16 x 16, got \(3, 3\)"),
    ],
    ids=range(7),
)  # fmt: skip
def test_what_fails_in_an_authors_method_names_it(net, data, methods, words):
    fisher = fv.Probe(net, "categorical").fisher(data[0])
    for call in (fv.approximate, lambda f, m: fv.compare(f, [m])):
        with pytest.raises((TypeError, RuntimeError), match=words):
            call(fisher, author(**methods))


def test_an_authors_own_refusal_stays_what_it_is_and_says_where(net, data):
    def refuse(self, layer, values):
        raise ValueError("not this layer.")

    with pytest.raises(ValueError, match="not this layer") as caught:
        fv.compare(fv.Probe(net, "categorical").fisher(data[0]), [author(operator_for=refuse)])
    assert str(caught.value) == "not this layer."
    assert caught.value.__notes__ == ["raised in Mine.operator_for('0')."]


def test_an_incomplete_approximation_says_what_is_missing(net, data):
    incomplete = type("Half", (fv.Approximation,), {"statistics": lambda self, layer: {}})
    for call in (lambda: fv.register("half", incomplete), lambda: fv.approximate(None, incomplete)):
        with pytest.raises(TypeError, match=r"Half is no complete approximation: it must define operator_for\."):
            call()
    assert "half" not in fv.approximations


# ---- what compare is given -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": 3}, "methods="), ({"methods": [3]}, "method must be"), ({"methods": {"a": 3}}, "method must be"),
        ({"methods": []}, "no method"), ({"metrics": 3}, "metrics="), ({"metrics": [3]}, "unknown metric 3"),
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


def test_an_instance_takes_no_options(net, data):
    fisher = fv.Probe(net, "categorical").fisher(data[0])
    with pytest.raises(TypeError, match=r"options \(setting\).*this kfac is an instance"):
        fv.approximate(fisher, fv.approximate(fisher, "kfac"), setting="reduce")


def test_the_summary_says_what_was_left_out(net, data):
    fisher = fv.Probe(net, "categorical").fisher(*data)
    comparison = fv.compare(fisher, ["kfac"], damping=0.1, gradient=torch.zeros(31).double())
    sentence = "directions are left out: the gradient is zero."
    assert comparison.notes == (sentence,)
    assert comparison.summary().attrs["notes"] == [sentence]
    assert "1 left out: see .notes" in repr(comparison)
    assert sentence in comparison._repr_html_()


# ---- progress --------------------------------------------------------------------------------------------------------


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


# ---- what a probe is given -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (torch.tensor(1), "first dimension"), (1, "first dimension"), (["a"] * 7, "list.*class indices"),
        ([[1], [1, 2]], "list.*class indices"), ({"a": 1}, "dict.*class indices"), (len, "builtin"),
    ],
    ids=range(6),
)  # fmt: skip
def test_odd_targets_are_named(net, data, targets, words):
    probe = fv.Probe(net, "categorical")
    for source in ((data[0], targets), [(data[0], targets)]):
        with pytest.raises((TypeError, ValueError), match=words):
            probe.fisher(source, kind="empirical").norm()


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (lambda x, y: x.float(), r"parameters are float64 and the data is float32.*inputs.to\(torch.float64\)"),
        (lambda x, y: x.round().long(), "parameters are float64 and the data is int64"),
        (lambda x, y: x.numpy(), "ndarray; convert them with torch.as_tensor"),
        (lambda x, y: (x, y, y), r"too many positional arguments.*a pair \(inputs, targets\)"),
        (lambda x, y: [(x, y, y)], r"too many positional arguments.*a pair \(inputs, targets\)"),
        (lambda x, y: [{"input": x, "label": y}], r"keyword argument 'label'.*\(\{'x': x\}, labels\)"),
        (lambda x, y: {"images": x}, r"Sequential.forward does not take"),
    ],
    ids=range(7),
)
def test_batches_of_another_form_are_named_with_the_way_out(net, data, batch, words):
    with pytest.raises((TypeError, ValueError), match=words):
        fv.Probe(net, "categorical").fisher(batch(*data)).norm()


class Broken(nn.Linear):
    def forward(self, input):
        raise RuntimeError("out of luck")


def test_a_model_that_fails_by_itself_is_not_explained_away(data):
    with pytest.raises(RuntimeError, match=r"^out of luck$"):
        fv.Probe(Broken(3, 3).double(), "categorical").fisher(data[0]).norm()


@pytest.mark.parametrize("layers", [0, [0], []], ids=str)
def test_layers_that_are_none(net, layers):
    with pytest.raises((TypeError, ValueError), match="layers="):
        fv.Probe(net, "categorical", layers=layers)


@pytest.mark.parametrize("variance", ["a", None, True, [1], 1j, 0, float("inf")], ids=str)
def test_variances_that_are_none(variance):
    with pytest.raises(ValueError, match="variance"):
        fv.Gaussian(variance)


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


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.MultiheadAttention(4, 1, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.inner(x, x, x)[0].mean(1))


def test_paths_are_promises_until_a_first_pass():
    probe = fv.Probe(Attention(), "categorical")
    promised = "structured if the first pass confirms it"
    assert repr(probe).count(promised) == probe._repr_html_().count(promised) == 2
    probe.fisher(torch.ones(2, 5, 4)).norm()
    assert promised not in repr(probe)
    assert "generic: its forward did not run" in repr(probe)


def test_a_module_stands_for_all_layers_inside_it():
    attention = Attention()
    inside = ("inner", "inner.out_proj")
    assert fv.Probe(attention, "categorical", layers=["inner"]).space.names == inside
    assert fv.Probe(attention, "categorical", layers=[""]).space.names == (*inside, "last")


# ---- where results are written ---------------------------------------------------------------------------------------


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


# ---- spectra ---------------------------------------------------------------------------------------------------------


def test_spectra_are_drawn_of_all_that_heatmaps_are_drawn_of(net, data):
    fisher = fv.Probe(net, "categorical").fisher(data[0])
    dense, kfac = fisher.to_dense(), fv.approximate(fisher, "kfac")
    exact = torch.linalg.eigvalsh(dense).flip(0)[:14].numpy()
    for source in (fisher, dense, dense.float(), dense.numpy(), fisher.spectrum()):
        (line,) = fv.plot.spectrum(source, ax=Figure().subplots()).lines
        assert line.get_ydata()[:14] == pytest.approx(exact, rel=1e-6, abs=1e-6)
    expected = torch.linalg.eigvalsh(kfac.to_dense()).flip(0)
    for source in (kfac, {"kfac": kfac}, {"kfac": kfac.to_dense()}, {"kfac": expected}):
        (line,) = fv.plot.spectrum(source, ax=Figure().subplots()).lines
        assert line.get_label() == "kfac"
        assert line.get_ydata()[:14] == pytest.approx(expected[:14].numpy(), rel=1e-6)
    for source, words in ((dense[:3], "square"), (dense.triu(), "symmetric"), (net, "cannot take the spectrum")):
        with pytest.raises((TypeError, ValueError), match=words):
            fv.plot.spectrum(source)


# ---- warnings --------------------------------------------------------------------------------------------------------


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
from tests.test_review import Deprecated
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
