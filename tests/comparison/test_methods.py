"""Methods of a comparison: they share passes, fail alone, go by their own names, and what was asked for is measured."""

import time

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.comparison.measures import MEASURES
from fisherviz.operators import Dense, Identity, Kronecker, KroneckerSum
from fisherviz.results import outputs
from fisherviz.results.comparison import load_comparison
from fisherviz.results.metrics import METRICS
from fisherviz.statistics import Diagonal, InputFactor, OutputFactor
from tests.oracles import exact, laws, nets

N = 9
TIMED = 3
"""Passes of the loss that the unit of costs is taken from."""


@pytest.fixture
def net():
    return nets.mlp(3, 4, 2)


@pytest.fixture
def data():
    return nets.vectors(N, 3), torch.randint(2, (N,))


def whole(comparison, metric="relative_frobenius"):
    return comparison.whole(metric)


# ---- passes and seconds ----------------------------------------------------------------------------------------------


def passes_of(net, data, *methods, **options):
    """Forward passes of the whole batch in its order during a comparison, after the first look."""
    count = 0

    def see(module, inputs, output):
        nonlocal count
        count += torch.equal(inputs[0], data[0])

    fisher = fv.Probe(net, "categorical").fisher(*data)
    fisher.look()
    handle = net.register_forward_hook(see)
    try:
        fv.compare(fisher, methods or None, **options)
    finally:
        handle.remove()
    return count


WITH_GRADIENTS = [name for name in fv.approximations if name not in ("identity", "foof")]
PLAIN = {"damping": 0.1, "metrics": "relative_frobenius"}


def test_one_pass_serves_the_fisher_and_all_methods_and_one_shows_slopes(net, data):
    others = [name for name in WITH_GRADIENTS if name != "kfra"]
    assert passes_of(net, data, *others, **PLAIN) == 1 + TIMED
    assert passes_of(net, data, *WITH_GRADIENTS, **PLAIN) == 2 + TIMED


def test_costs_take_a_pass_to_count_one_forward_alone_for_inputs_and_directions_one_for_the_gradient(
    net, data, monkeypatch
):
    monkeypatch.setattr("fisherviz.comparison.costs.TIMED", 0)
    assert passes_of(net, data) == 4 + TIMED


def test_captures_that_do_not_fit_take_one_pass_for_all_methods_and_one_for_those_that_refine(net, data, monkeypatch):
    monkeypatch.setattr("fisherviz.exact.passes.keep_limit", lambda device: 0)
    assert passes_of(net, data, "kfac", "diagonal", "cw-ngd", "kfac-full", "layer", **PLAIN) == 2 + TIMED
    assert passes_of(net, data, "kfac", "ekfac", "diagonal", "kfac-full", **PLAIN) == 3 + TIMED


class Slow(InputFactor):
    """A factor that takes its time."""

    def contribution(self, *captures):
        time.sleep(0.2)
        return super().contribution(*captures)


class SlowKFAC(fv.approximations["kfac"]):
    """KFAC from it."""

    def statistics(self, layer):
        return {"A": Slow(layer.name), "G": OutputFactor(layer.name)}


class SlowToo(SlowKFAC):
    """The same from the same statistics."""


def test_statistics_that_two_methods_share_count_for_each_and_for_no_other(net, data, monkeypatch):
    monkeypatch.setattr("fisherviz.comparison.costs.TIMED", 0)
    fisher = fv.Probe(net, "categorical").fisher(*data)
    start = time.perf_counter()
    seconds = whole(fv.compare(fisher, [SlowKFAC, SlowToo, "diagonal"], damping=0.1, metrics="seconds"), "seconds")
    assert time.perf_counter() - start < 0.8  # two layers, once
    assert min(seconds["SlowKFAC"], seconds["SlowToo"]) > 0.4
    assert seconds["diagonal"] < 0.2


@pytest.mark.parametrize("kept", [True, False])
def test_refinement_pays_a_second_pass_unless_captures_were_kept(net, data, monkeypatch, kept):
    if not kept:
        monkeypatch.setattr("fisherviz.exact.passes.keep_limit", lambda device: 0)
    net.register_forward_hook(lambda module, inputs, output: time.sleep(0.2 * (len(output) == N)))
    fisher = fv.Probe(net, "categorical").fisher(*data)
    methods = ["identity", "foof", "kfac", "ekfac"]
    seconds = whole(fv.compare(fisher, methods, damping=0.1, metrics="seconds"), "seconds")
    assert seconds["identity"] < 0.2 <= seconds["foof"] < 0.4
    assert 0.2 <= seconds["kfac"] < 0.4
    assert seconds["ekfac"] < 0.4 if kept else seconds["ekfac"] >= 0.4


# ---- failures --------------------------------------------------------------------------------------------------------


class Refused(Diagonal):
    """A statistic that fails."""

    def contribution(self, *captures):
        raise ValueError("this statistic has no sum.")


def broken(where):
    """An approximation that fails in one place."""

    class Broken(fv.Approximation):
        """Fails."""

        def statistics(self, layer):
            return {"d": (Refused if where == "statistic" else Diagonal)(layer.name)}

        def operator_for(self, layer, values):
            if where == "building":
                raise MemoryError("no room for it.")
            return Undense(values["d"].diag()) if where == "measuring" else Identity(layer.size)

        def refine(self, layer, values):
            return {"more": Refused(layer.name)} if where == "refinement" else {}

    return Broken


class Undense(Dense):
    """An operator that cannot be written out."""

    def to_dense(self):
        raise NotImplementedError("it has no dense form.")


@pytest.mark.parametrize("where", ["statistic", "refinement", "building", "measuring"])
def test_a_method_that_fails_is_a_note_and_the_others_are_compared_as_without_it(net, data, where):
    expected = fv.compare(fv.Probe(net, "categorical").fisher(*data), ["kfac", "ekfac"], damping=0.1)
    found = fv.compare(fv.Probe(net, "categorical").fisher(*data), ["kfac", broken(where), "ekfac"], damping=0.1)
    assert found.methods == ("kfac", "ekfac")
    assert [note for note in found.notes if note.startswith("Broken is left out: ")] != []
    for metric in ("relative_frobenius", "kl", "direction_cosine"):
        assert whole(found, metric) == pytest.approx(whole(expected, metric), rel=1e-10)


def failing(where, error):
    """An approximation whose own code raises an error in one place."""

    class Failing(Dense):
        """The operator."""

        def to_dense(self):
            if where == "to_dense":
                raise error("of my own")
            return super().to_dense()

        def shifted(self, strength):
            if where == "shifted":
                raise error("of my own")
            return super().shifted(strength) if where != "solve" else Failing(super().shifted(strength).M)

        def _solve(self, v):
            if where == "solve":
                raise error("of my own")
            return super()._solve(v)

    class Author(fv.Approximation):
        """The approximation."""

        def statistics(self, layer):
            if where == "statistics":
                raise error("of my own")
            return {"d": Diagonal(layer.name)}

        def operator_for(self, layer, values):
            if where == "operator_for":
                raise error("of my own")
            return Failing(values["d"].diag())

    return Author


@pytest.mark.covering
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("where", ["statistics", "operator_for", "to_dense", "shifted", "solve"])
@pytest.mark.parametrize(
    "error",
    [
        ValueError, RuntimeError, NotImplementedError, MemoryError, TypeError, torch.linalg.LinAlgError,
        np.linalg.LinAlgError, KeyError, IndexError, ZeroDivisionError, AttributeError, AssertionError,
    ],
)  # fmt: skip
def test_whatever_an_author_raises_is_a_note_with_its_kind(net, data, monkeypatch, where, error, large):
    if large:
        monkeypatch.setattr("fisherviz.comparison.planning.why_not_dense", lambda *given: "which are too many")
    monkeypatch.setattr("fisherviz.comparison.costs.TIMED", 0)
    fisher = fv.Probe(net, "categorical").fisher(*data)
    found = fv.compare(fisher, ["kfac", failing(where, error), "foof"], damping=0.1, progress=False)
    assert {"kfac", "foof"} <= set(found.whole("direction_cosine"))
    if where == ("to_dense" if large else "solve"):  # nobody asks for it
        assert "Author" in found.whole("direction_cosine")
    else:
        assert "Author" not in found.whole("direction_cosine")
        kinds = {kind.__name__ for kind in error.__mro__} - {"Exception", "object"}  # a place may be named on the way
        (note,) = [note for note in found.notes if "Author" in note and "of my own" in note]
        # the kind, or where the package says what it met: the author's own line
        assert any(f"{kind}: " in note for kind in kinds) or "(test_methods.py, line " in note


class Blockless(fv.Approximation):
    """An approximation that cannot show a block."""

    def statistics(self, layer):
        return {"d": Diagonal(layer.name)}

    def operator_for(self, layer, values):
        return Dense(values["d"].diag())

    def operator(self, row, col):
        raise ValueError("there is no such block.")


class Productless(Blockless):
    """An approximation whose blocks multiply nothing."""

    def operator(self, row, col):
        class Unsummed(KroneckerSum):
            def _matmul(self, v):
                raise ValueError("there is no such product.")

        return Unsummed([(torch.eye(4).double(), torch.eye(2).double())])


@pytest.mark.parametrize(("method", "why"), [(Blockless, "block"), (Productless, "product")])
def test_without_matrices_too_a_method_that_fails_is_a_note(method, why, monkeypatch):
    monkeypatch.setattr("fisherviz.comparison.planning.why_not_dense", lambda *given: "which are too many")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(3, 2, 1), nn.Tanh(), nets.MeanPixels()).double()
    fisher = fv.Probe(net, "categorical").fisher(torch.randn(5, 3, 4, dtype=torch.float64))
    expected = fv.compare(fisher, ["kfac", "ekfac"], damping=0.1)
    found = fv.compare(fisher, ["kfac", method, "ekfac"], damping=0.1)
    assert found.methods == ("kfac", "ekfac")
    said = f"{method.__name__} is left out: ValueError: there is no such {why}. (test_methods.py, line "
    assert any(note.startswith(said) for note in found.notes)
    assert whole(found, "relative_frobenius") == pytest.approx(whole(expected, "relative_frobenius"), rel=1e-10)


@pytest.mark.parametrize(("where", "error"), [("statistic", ValueError), ("building", MemoryError)])
def test_where_every_method_fails_the_first_error_is_raised(net, data, where, error):
    with pytest.raises(error, match=r"no sum|no room"):
        fv.compare(fv.Probe(net, "categorical").fisher(*data), {"one": broken(where), "two": broken("statistic")})


def test_the_monitor_goes_on_without_a_method_that_fails(net, data):
    monitor = fv.Monitor(fv.Probe(net, "categorical"), ["kfac", broken("building")], data=data, damping=0.1)
    assert set(monitor.measure(3)["method"]) == {"exact", "kfac"}
    said = "step 3: Broken is left out: MemoryError: no room for it. (test_methods.py, line "
    assert any(note.startswith(said) for note in monitor.notes)
    alone = fv.Monitor(fv.Probe(net, "categorical"), broken("building"), data=data, damping=0.1)
    with pytest.raises(MemoryError, match="no room"):
        alone.measure(0)


# ---- names -----------------------------------------------------------------------------------------------------------


class A(fv.Approximation):
    """KFAC with the diagonal of G."""

    def statistics(self, layer):
        return {"A": InputFactor(layer.name), "G": OutputFactor(layer.name)}

    def operator_for(self, layer, values):
        return Kronecker(values["A"], values["G"].diagonal().diag())


class B(A):
    """The identity of another name."""

    def operator_for(self, layer, values):
        return Identity(layer.size, dtype=torch.float64)


def test_unregistered_classes_go_by_their_names(net, data):
    found = fv.compare(fv.Probe(net, "categorical").fisher(*data), [A, B], damping=0.1)
    assert found.methods == ("A", "B")
    F = exact.fisher(net, data[0], laws.Categorical())
    assert whole(found)["B"] == pytest.approx(np.linalg.norm(F - np.eye(len(F))) / np.linalg.norm(F))


def test_the_monitor_takes_what_compare_takes(net, data):
    probe = fv.Probe(net, "categorical")
    stale = fv.approximate(probe.fisher(*data), "diagonal")
    given = {"mine": A, "unfitted": fv.approximations["kfac"](setting="reduce"), "stale": stale, "named": "foof"}
    monitor = fv.Monitor(probe, given, data=data, damping=0.1)
    monitor.measure(0)
    old = torch.diag(stale.diagonal()).numpy()
    with torch.no_grad():
        net[0].weight.mul_(3)
    found = monitor.measure(1)
    assert set(found["method"]) == {"exact", *given}
    F = exact.fisher(net, data[0], laws.Categorical())
    rows = found[(found["layer"] == "all") & (found["metric"] == "relative_frobenius")].set_index("method")["value"]
    assert rows["stale"] == pytest.approx(np.linalg.norm(F - old) / np.linalg.norm(F))
    for label, method in (("mine", A), ("unfitted", "kfac")):
        now = fv.approximate(probe.fisher(*data), method).to_dense().numpy()
        assert rows[label] == pytest.approx(np.linalg.norm(F - now) / np.linalg.norm(F))
    assert set(found[found["metric"] == "foof_cosine_factored"]["method"]) == {"unfitted"}


def test_exact_is_no_approximation_and_no_label(net, data):
    fisher = fv.Probe(net, "categorical").fisher(*data)
    for call in (lambda: fv.approximate(fisher, "exact"), lambda: fv.compare(fisher, ["kfac", "exact"])):
        with pytest.raises(ValueError, match=r"'exact' is no approximation: use the Fisher itself.*'layer'"):
            call()
    with pytest.raises(ValueError, match="label 'exact' means the Fisher itself"):
        fv.compare(fisher, {"exact": "kfac"})
    with pytest.raises(ValueError, match="register yours under another name"):
        fv.register("exact", A)


def test_what_belongs_to_the_exact_fisher_stands_under_its_name(net, data, tmp_path):
    comparison = fv.compare(fv.Probe(net, "categorical").fisher(*data), {"cw-ngd": "kfac"}, damping=0.1)
    rows = comparison.frame[comparison.frame["metric"] == "off_unit_share"]
    assert list(rows["method"]) == ["exact", "exact"]
    assert comparison.methods == tuple(comparison.summary().index) == ("cw-ngd",)
    loaded = load_comparison(comparison.save(tmp_path / "saved"))
    assert loaded.frame.equals(comparison.frame)
    assert fv.plot.comparison(loaded, "off_unit_share").get_yticklabels()[0].get_text() == "exact"
    page = loaded.to_html(tmp_path / "page.html").read_text()
    assert METRICS["off_unit_share"].title in page


# ---- what was asked for ----------------------------------------------------------------------------------------------


def test_a_metric_that_needs_the_matrix_is_computed_where_it_was_asked_for(net, data, monkeypatch):
    monkeypatch.setattr("fisherviz.comparison.planning.why_not_dense", lambda *given: "which are too many")
    fisher = fv.Probe(net, "categorical").fisher(*data)
    found = fv.compare(fisher, "kfac", damping=0.1, metrics=["relative_nuclear", "inverse_frobenius"])
    F, M = exact.fisher(net, data[0], laws.Categorical()), fv.approximate(fisher, "kfac").to_dense().numpy()
    inverse, other = (np.linalg.inv(matrix + 0.1 * np.eye(len(F))) for matrix in (F, M))
    expected = np.linalg.norm(inverse - other) / np.linalg.norm(inverse)
    assert whole(found, "inverse_frobenius") == {"kfac": pytest.approx(expected)}
    nuclear = np.linalg.norm(F - M, "nuc") / np.linalg.norm(F, "nuc")
    assert whole(found, "relative_nuclear") == {"kfac": pytest.approx(nuclear)}
    monkeypatch.setattr("fisherviz.support.memory.available", lambda device: 0)
    with pytest.raises(MemoryError, match="writing the matrices out for relative_nuclear takes"):
        fv.compare(fisher, "kfac", damping=0.1, metrics=["relative_nuclear", "inverse_frobenius"])


def test_a_table_is_never_empty(net, data):
    with pytest.raises(ValueError, match=r"nothing of direction_cosine can be measured: .*no targets"):
        fv.compare(fv.Probe(net, "categorical").fisher(data[0]), "kfac", damping=0.1, metrics="direction_cosine")


def test_every_metric_of_the_list_has_its_measure():
    assert MEASURES.keys() == METRICS.keys()
    assert {entry.needs for entry in METRICS.values()} <= {"", "matrix", "damping", "direction", "cost", "exact"}


def test_an_output_that_nothing_makes_is_named(monkeypatch, net, data, tmp_path):
    comparison = fv.compare(fv.Probe(net, "categorical").fisher(*data), "kfac", metrics="bytes")
    monkeypatch.setattr(outputs, "_OUTPUTS", {})
    with pytest.raises(RuntimeError, match="nothing makes a page here; import fisherviz"):
        comparison.to_html(tmp_path / "page.html")


# ---- networks without structure --------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A bare parameter."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))

    def forward(self, x):
        return (x @ self.w).tanh()


class Last(nn.Module):
    """An LSTM's last state."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 2, batch_first=True).double()

    def forward(self, x):
        return self.lstm(x)[0][:, -1]


@pytest.mark.parametrize(
    ("model", "x"),
    [(Scaled, torch.randn(7, 3, dtype=torch.float64)), (Last, torch.randn(7, 4, 3, dtype=torch.float64))],
)
def test_a_network_without_a_structured_layer_is_compared(model, x):
    net = model()
    comparison = fv.compare(fv.Probe(net, "gaussian").fisher(x), damping=0.1)
    assert set(fv.approximations) == set(comparison.methods)
    F = exact.fisher(net, x, laws.Gaussian())
    error = np.linalg.norm(F - np.diag(np.diag(F))) / np.linalg.norm(F)
    for method in ("diagonal", "kfac", "kfac-full", "kfac-tridiagonal", "nearest-kronecker"):
        assert whole(comparison)[method] == pytest.approx(error)
    assert whole(comparison)["layer"] < 1e-12
