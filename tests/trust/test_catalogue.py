"""Nothing silently wrong: rows of the catalogue, and that the catalogue would see what is wrong.

All rows, requests and precisions are asked by `make soak` and by `benchmarks/trust/catalogue.py`.
"""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import fisherviz as fv
from benchmarks.trust import catalogue
from benchmarks.trust.catalogue import peers_table
from benchmarks.trust.paragraph import kept
from fisherviz.capture.agreement import noise
from fisherviz.capture.evidence import TOGETHER
from fisherviz.capture.look import look
from tests.trust.catalogue import KINDS
from tests.trust.catalogue.parts import Bare, Formula, network
from tests.trust.catalogue.row import Row, altered, drawn, normal, outcome, state

ALL = [(kind, row) for kind, found in KINDS.items() for row in found]
QUICK = ("losses and likelihoods", "outputs", "state, hooks, chance, coupling")


def asked(row, dtype, *requests):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return outcome(row, dtype, *requests)


@pytest.mark.parametrize(("kind", "row"), [(kind, row) for kind, row in ALL if kind in QUICK], ids=lambda part: str(
    getattr(part, "name", "")))  # fmt: skip
def test_a_row_is_exact_or_refused(kind, row):
    if "compile" in row.name:
        pytest.skip("compiles for seconds: asked by the soak tests")
    found = asked(row, row.dtypes[0], ("product",))
    assert found.verdict == ("refused" if row.refused else "exact"), found.said


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "row"), ALL, ids=lambda part: getattr(part, "name", ""))
def test_a_row_is_exact_or_refused_whatever_is_asked(kind, row):
    for dtype in row.dtypes:
        found = asked(row, dtype)
        assert found.verdict == ("refused" if row.refused else "exact"), found.said


def test_rows_have_names_of_their_own():
    for found in KINDS.values():
        assert len({row.name for row in found}) == len(found)


# ---- the catalogue itself sees what is wrong -------------------------------------------------------------------------


def test_another_network_than_the_oracles_is_wrong():
    row = Row("other", drawn(network), lambda: normal(5, 3), oracle=drawn(network, seed=1))
    assert asked(row, torch.float64, ("dense",)).verdict == "wrong"


def test_an_answer_where_a_refusal_must_be_is_wrong():
    row = Row("answered", drawn(network), lambda: normal(5, 3), "never")
    assert asked(row, torch.float64, ("dense",)).verdict == "wrong"


def test_an_error_from_inside_torch_is_no_refusal():
    def failing(parts, x):
        return x @ torch.zeros(7, 7)

    row = Row("raw", drawn(lambda: Formula(failing, nn.Linear(3, 2))), lambda: normal(5, 3), "shapes")
    assert asked(row, torch.float64, ("dense",)).verdict == "raw"


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net[0].weight.data.mul_(1 + 1e-15),
        lambda net: net.train(),
        lambda net: net[0].register_forward_hook(lambda *_: None),
        lambda net: setattr(net[0], "seen", 1),
        lambda net: net[3].bias.requires_grad_(False),
        lambda net: setattr(net[3].weight, "grad", torch.zeros(2, 4).double()),
    ],
    ids=["a bit", "the mode", "a hook", "an attribute", "a frozen bias", "a gradient"],
)
def test_a_guest_that_was_touched_is_seen(change):
    net = drawn(network)()
    before = state(net)
    assert not altered(before, state(net))
    change(net)
    assert altered(before, state(net))


# ---- evidence is taken where it can show the fault -------------------------------------------------------------------


class Exchanging(nn.Module):
    """Exchanges two examples inside, both beyond a threshold: never those that are looked at one by one."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        far = (x[:, 0] > 1).nonzero()[:, 0]
        order = torch.arange(len(x))
        order[far] = far.flip(0)
        return self.head(torch.tanh(self.a(x[order]))[order.argsort()])


@pytest.mark.parametrize("places", [(2, 3), (4, 9), (10, 11)])
def test_layers_that_see_examples_in_another_order_are_found_out_beyond_the_first_two(places):
    x = normal(12, 3).clamp(max=0.9)
    x[list(places), 0] = 2.0
    net = drawn(Exchanging)()
    probe = fv.Probe(net, "categorical")
    probe.look(x)
    assert [info.path for info in probe.layers] == ["generic", "structured"]


class LateRule(torch.autograd.Function):
    """The identity; its rule for vmap doubles what is beyond 100."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g

    @staticmethod
    def vmap(info, in_dims, x):
        return torch.where(x > 100, 2 * x, x.clone()), in_dims[0]


def test_a_batching_rule_that_is_wrong_for_examples_that_nobody_looked_at():
    """Every piece of every pass is held against autograd's sums, not the first examples alone."""
    x = normal(4 * TOGETHER, 3).div(10)
    x[-3] = torch.tensor([101.0, 0.0, 0.0])

    def build():
        return Formula(lambda m, x: m[1](torch.tanh(m[0](x)) + 1e-2 * LateRule.apply(x)), Bare(), nn.Linear(3, 2))

    batches = list(x.split(TOGETHER // 4))
    row = Row("late", drawn(build), lambda: batches)
    assert asked(row, torch.float64, ("dense", "product")).verdict == "exact"


def test_a_tangent_that_a_model_overwrites_is_not_the_callers():
    class Clamping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x):
            with torch.no_grad():
                self.a.weight.clamp_(-0.1, 0.1)
            return self.a(x)

    fisher = fv.Probe(drawn(Clamping)(), "categorical").fisher(normal(5, 3))
    v = torch.ones(fisher.shape[0]).double()
    fisher @ v
    fisher.quadratic(v)
    assert bool((v == 1).all())


def test_looking_leaves_weights_that_a_forward_rewrites():
    class Rewriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x):
            self.a.weight.data = self.a.weight.data * 0.9
            return self.a(x)

    net = drawn(Rewriting)()
    before, memory = net.a.weight.detach().clone(), net.a.weight.data_ptr()
    probe = fv.Probe(net, "categorical")
    with pytest.raises(RuntimeError, match="changes with the other examples of the batch, or at random"):
        look(probe.network, normal(5, 3))  # each forward is of another function
    assert torch.equal(net.a.weight, before)
    assert net.a.weight.data_ptr() == memory


def test_noise_is_always_the_same():
    like = torch.zeros(4)
    assert torch.equal(noise(like, 1), noise(like, 1))
    assert not torch.equal(noise(like, 1), noise(like, 2))


def test_the_manual_says_what_was_measured_of_other_libraries():
    page = (Path(__file__).parents[2] / "docs/layers.md").read_text(encoding="utf-8")
    assert peers_table(kept("catalogue")["long"]["found"]["peers"]) in page


def test_the_paragraph_says_what_does_not_hold():
    rows = {
        "rows": 1,
        "asked": 2,
        "exact": 0,
        "refused": 0,
        "worst": {},
        "wrong": ["a row (torch.float64): wrong; dense"],
    }
    peers = [{"case": "plain", "libraries": {"fisherviz": {"version": "0", "error": 0.5}}}]
    tests = {"words": {"path": "tests/x.py", "passed": 3, "failed": 1}}
    found = {"requests": ["dense"], "kinds": {"kind": rows}, "tests": tests, "peers": peers}
    assert len(catalogue.broken(found)) == 3
    assert "| kind | 1 | 0 | 0 | 1 | - |" in "\n".join(catalogue.words(found))
    assert "50 % off" in "\n".join(catalogue.words(found))
