"""A sample of the page's sweep stays within its bounds, nothing public is left out, a planted fault is found."""

import importlib
import math
import pkgutil
import warnings

import pytest
import torch

import fisherviz as fv
from benchmarks.trust import numerics, numerics_edges, numerics_networks, numerics_operators
from benchmarks.trust.numerics_operators import BLOCKS, POSITIVE, Draw, Found
from fisherviz.exact.fisher import Fisher
from fisherviz.matrices.layered import LayeredMatrix
from fisherviz.operators import Kronecker, Operator
from fisherviz.results.metrics import METRICS
from tests.oracles.definitions import METHODS

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def concrete(kind=Operator):
    for child in kind.__subclasses__():
        yield from concrete(child)
        if not child.__abstractmethods__ and not child.__name__.startswith("_"):
            yield child


# ---- nothing is left out ------------------------------------------------------------------------


def test_every_class_of_operators_is_swept():
    for module in pkgutil.walk_packages(fv.__path__, "fisherviz."):
        if module.name.split(".")[1] in ("operators", "matrices", "approximations"):
            importlib.import_module(module.name)
    names = {kind.__name__ for kind in concrete() if kind.__module__.startswith("fisherviz.")}
    assert names <= {name.split(" ")[0] for name in POSITIVE | BLOCKS}


NOT_NUMBERS = {
    "direct", "dtype", "device", "bytes", "each", "factored", "map_factors", "require_square", "shape", "tensors",
    "trust",
}  # fmt: skip
"""What an operator is, how it is put together; `map_factors` and `each` are what "damped, factored" asks."""


def test_every_method_of_an_operator_is_asked():
    asked = {"T", "to_dense", "diagonal", "scale", "norm", "shifted", "inverse", "solve", "inverse_root"}
    asked |= {"log_determinant", "damped"}
    public = {name for name in vars(Operator) if not name.startswith("_")} | set(Operator.__annotations__)
    assert {name for name in public if not name.startswith("_")} <= asked | NOT_NUMBERS


WITHOUT_ENTRIES = {
    "check_unchanged", "collect", "columns", "deal", "empty", "example_space", "examples", "forget", "fresh",
    "has_targets", "in_example_space", "keeps_captures", "layers", "look", "loss_effort", "pass_effort", "plan",
    "scale", "shape", "space", "structure", "title", "unit_block", "weight", "weights_fingerprint", "with_captures",
    "with_scores", "release_solver", "known_square_norms",
}  # fmt: skip
"""What a Fisher is made of and what it costs; `unit_block` is `block` in another order, `known_square_norms` are
what `norm` has given."""


def test_every_quantity_of_the_exact_fisher_is_asked():
    public = {name for kind in Fisher.__mro__ for name in vars(kind) if not name.startswith("_")} - WITHOUT_ENTRIES
    asked = " ".join(numerics_networks.EXACT)
    assert {name for name in public if name not in asked} == set()


def test_every_approximation_has_a_definition_and_every_metric_a_formula():
    assert set(fv.approximations) == set(METHODS)
    F = torch.eye(2, dtype=torch.float64).numpy()
    known = set(numerics_networks.metrics_of(F, 2 * F, 1.0, F[0]))
    assert {name for name, metric in METRICS.items() if metric.needs not in ("cost", "exact")} == known


def test_every_answer_of_a_structured_matrix_is_asked():
    not_numbers = {"block", "bytes", "layers", "operator", "operators", "save", "shape", "title", "to_scipy", "whole"}
    public = {name for name in vars(LayeredMatrix) if not name.startswith("_")} - not_numbers
    asked = {"to_dense", "diagonal", "norm", "damped", "solve", "inverse", "inverse_root", "scale"}
    assert public <= asked


# ---- a sample of the sweep ------------------------------------------------------------------------


@every_dtype
def test_operators_are_within_the_bounds(dtype):
    worst = numerics.worst_of_operators(range(40, 42), dtype)
    assert len(worst.found) == len(numerics_operators.OPERATIONS)
    for name, entry in worst.found.items():
        assert entry["units"] <= numerics.OPERATOR_BOUND, name


@every_dtype
def test_quantities_of_networks_are_within_the_bounds(dtype):
    for group, worst in numerics.worst_of_networks(range(200, 201), dtype).items():
        for name, entry in worst.found.items():
            assert entry["units"] <= numerics.NETWORK_BOUND, (group, name)


@pytest.mark.parametrize("case", ["inputs of 1e20", "inputs of 1e12"])
def test_requests_at_an_edge_are_right_or_refused_with_the_layer(case):
    for _, request, state, said in numerics_edges.edges([case]):
        assert state in ("right", "refused"), (request, state, said)
        if case == "inputs of 1e20" and state == "refused" and request != "undamped solve":
            assert "layer '0'" in said, (request, said)


def test_no_solve_is_silently_wrong_in_float32():
    outcomes = [state for _, _, state, _ in numerics_edges.solves(range(1), torch.float32, range(2, 11, 4))]
    assert set(outcomes) <= {"small", "warned", "refused"}
    assert outcomes.count("small") > 30


def test_the_default_damping_ranks_alike_in_both_precisions():
    counted = numerics_edges.rankings(range(1))
    assert counted["same"] > 100
    assert not counted["changed"]


# ---- the machinery ------------------------------------------------------------------------


def test_a_wrong_product_is_found(monkeypatch):
    monkeypatch.setattr(Kronecker, "_matmul", lambda self, v: (1 + 1e-5) * (self.to_dense() @ v))
    draw = Draw(1, torch.float64)
    worst = numerics.Worst(torch.float64, by_rows=True)
    for found in numerics_operators.measured(*POSITIVE["Kronecker"](draw), draw, True):
        worst.add(found)
    assert worst.found["product"]["units"] > numerics.OPERATOR_BOUND
    assert worst.found["diagonal"]["units"] <= numerics.OPERATOR_BOUND


def test_what_is_not_finite_counts_as_infinitely_wrong():
    assert numerics_operators.off(torch.tensor([math.nan, 1.0]), [1.0, 1.0]) == math.inf
    assert numerics_operators.off(torch.zeros(2), torch.zeros(3)) == math.inf


def test_broken_names_what_passes_its_bound():
    worst = numerics.Worst(torch.float64, by_rows=False)
    worst.add(Found("product", 1e-3, 1.0, 4))
    errors = {"float64": {"exact": worst.found}}
    edges = {"not right": ["a case, solve: nan"], "outcomes": {}, "cases": 1}
    found = {"errors": errors, "solves": {"float32": {"silent": 2}}, "rankings": {"changed": 1}, "edges": edges}
    said = " ".join(numerics.broken(found))
    for words in ("product, float64", "2 silent solves", "1 pairs", "a case, solve"):
        assert words in said


@pytest.mark.parametrize(
    ("ask", "state"),
    [
        (lambda: 1.0, "answered"),
        (lambda: warnings.warn("a word", stacklevel=1), "warned"),
        (lambda: fv.Probe("no network", "gaussian"), "refused"),
        (lambda: torch.ones(2) @ torch.ones(3), "raw"),
        (lambda: 1 / 0, "raw"),
    ],
)
def test_an_outcome_is_an_answer_a_sentence_or_a_raw_error(ask, state):
    assert numerics_edges.outcome(ask)[0] == state


@pytest.mark.soak
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_answers_every_request_or_refuses_it(dtype):
    """Within what three layers of a network lose that runs in it."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).to(dtype)
    wide = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    wide.load_state_dict({name: value.double() for name, value in net.state_dict().items()})
    x, y = torch.randn(7, 3).to(dtype), torch.randint(3, (7,))
    half, right = fv.Probe(net, "categorical").fisher(x, y), fv.Probe(wide, "categorical").fisher(x.double(), y)
    rights = numerics_edges.requests(right, 0.1)
    for request, ask in numerics_edges.requests(half, 0.1).items():
        state, found = numerics_edges.outcome(ask)
        assert state != "raw", request
        if state != "refused":
            expected = numerics_edges.plain_of(rights[request]())
            off = numerics_operators.off(numerics_edges.plain_of(found), expected)
            assert off <= 0.05, request
