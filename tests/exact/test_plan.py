"""Plans against what happens: operations by the dispatcher's count, peaks of tensors by torch's profiler."""

import functools

import pytest
import torch
from torch import nn

import fisherviz as fv
from benchmarks.measure import operations
from fisherviz.capture.formed import FormedCapture
from fisherviz.support.numbers import human
from fisherviz.support.peaks import peak_bytes

REQUESTS = {
    "diagonal": lambda f: f.diagonal(),
    "product": lambda f: f @ torch.ones(f.shape[0]),
    "norm": lambda f: f.norm(),
    "example_gram": lambda f: f.example_gram(),
    "solve": lambda f: f.solve(torch.ones(f.shape[0]), 1e-6 * f.norm("trace")),
    "spectrum": lambda f: f.spectrum(),
    "to_dense": lambda f: f.to_dense(),
}


class Block(nn.Module):
    """A token embedding, a feed-forward block with a LayerNorm, a head."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(50, 32), nn.LayerNorm(32)
        self.up, self.down, self.head = nn.Linear(32, 128), nn.Linear(128, 32), nn.Linear(32, 50)

    def forward(self, tokens):
        x = self.table(tokens)
        return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))


def networks():
    torch.manual_seed(0)
    yield "wide", nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10)), torch.randn(100, 300), "exact"
    deep = nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 10))
    yield "deep", deep, torch.randn(600, 30), "exact"
    convolutions = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    yield "convolutions", convolutions.eval(), torch.randn(60, 3, 12, 12), "exact"
    yield "tokens", Block(), torch.randint(0, 50, (40, 16)), "mc"
    torch.manual_seed(0)
    table = nn.Sequential(nn.Embedding(3000, 20), nn.Flatten(), nn.Linear(100, 10))
    yield "a large table", table, torch.randint(0, 3000, (120, 5)), "exact"


NETWORKS = {name: rest for name, *rest in networks()}


def made(name):
    """A Fisher that has its captures, so that what a request takes beside them can be told."""
    model, inputs, kind = NETWORKS[name]
    fisher = fv.Probe(model, "categorical").fisher(inputs, kind=kind)
    fisher.example_space()
    return fisher


@functools.cache
def captures_take(name):
    """The operations of a Fisher's captures."""
    return operations(lambda: made(name))


LARGE = {"wide", "tokens", "a large table"}
"""Networks whose matrix is too large to write out."""


@pytest.mark.covering
@pytest.mark.parametrize(
    ("name", "request_"), [(n, r) for n in NETWORKS for r in REQUESTS if r != "to_dense" or n not in LARGE]
)
def test_a_plan_tells_what_a_request_takes(name, request_):
    fisher = made(name)
    captured = sum(capture.bytes for capture in fisher.example_space().values())
    plan = fisher.plan(request_)
    (step,) = plan.steps
    assert step.what == request_
    work = REQUESTS[request_]
    counted = operations(lambda: work(made(name))) - captures_take(name)
    if request_ == "solve":
        counted -= operations(lambda: made(name).norm("trace")) - captures_take(name)
    assert plan.multiply_adds == pytest.approx(1e9 * counted / 2, rel=0.15)
    if request_ == "solve":
        fisher.norm("trace")  # is kept, as in what was counted
    assert plan.bytes == pytest.approx(captured + peak_bytes(lambda: work(fisher)), rel=0.25)


class Tied(nn.Module):
    """A token embedding whose table is the head's weight."""

    def __init__(self):
        super().__init__()
        self.table, self.up, self.head = nn.Embedding(800, 128), nn.Linear(128, 128), nn.Linear(128, 800, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(torch.relu(self.up(self.table(tokens))))


@pytest.mark.parametrize("request_", ["diagonal", "product", "norm", "example_gram", "spectrum"])
def test_plans_of_a_tied_table_know_both_uses_and_form_gradients_once(request_):
    torch.manual_seed(0)
    model, tokens = Tied(), torch.randint(0, 800, (64, 32))

    def new():
        fisher = fv.Probe(model, "categorical").fisher(tokens, kind="mc")
        fisher.example_space()
        return fisher

    fisher = fv.Probe(model, "categorical").fisher(tokens, kind="mc")
    captured = sum(capture.bytes for capture in new().example_space().values())
    assert fisher.plan("norm").steps[0].bytes == pytest.approx(captured, rel=0.01)
    fisher = new()
    plan = fisher.plan(request_)
    assert plan.bytes == pytest.approx(captured + peak_bytes(lambda: REQUESTS[request_](fisher)), rel=0.25)
    counted = operations(lambda: REQUESTS[request_](new())) - operations(new)
    assert plan.multiply_adds == pytest.approx(1e9 * counted / 2, rel=0.15)


@pytest.mark.parametrize("name", NETWORKS)
def test_captures_are_planned_as_they_come(name):
    model, inputs, kind = NETWORKS[name]
    fisher = fv.Probe(model, "categorical").fisher(inputs, kind=kind)
    (captures, _) = fisher.plan("norm").steps
    found = fisher.example_space()
    assert captures.what == "captures"
    kept = sum(c.bytes for c in found.values())
    if any(isinstance(c, FormedCapture) for c in found.values()):  # beside what they are made of, here of all examples
        fixed, per_vector = fisher.structure.example_bytes
        kept += fisher.examples * (fixed + per_vector * fisher.vectors.count(fisher.structure.example_output))
    assert captures.bytes == pytest.approx(kept, rel=0.01)
    (vectors,) = {c.vectors for c in found.values()}
    assert captures.passes == pytest.approx((1 + vectors) / 3)


def test_a_plan_runs_nothing_on_the_data_and_leaves_the_model_alone():
    seen = []
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    before, inputs = {name: p.clone() for name, p in model.named_parameters()}, torch.randn(5000, 5)
    state = torch.get_rng_state()
    plan = fv.Probe(model, "categorical").fisher(inputs).plan()
    assert max(seen) <= 64
    assert {step.what for step in plan.steps} == {*REQUESTS, "captures"}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_does_not_fit_the_budget_is_said_and_refused(monkeypatch):
    model, inputs, _ = NETWORKS["wide"]
    fisher = fv.Probe(model, "categorical").fisher(inputs)
    assert fisher.plan("solve").fits
    monkeypatch.setattr(fv.config, "_memory_budget", 4 * 2**20)
    plan = fisher.plan("diagonal", "to_dense")
    assert not plan.fits
    assert "(too much)" in repr(plan)
    assert "too little for to_dense" in plan.verdict
    assert list(plan.frame()["fits"]) == [True, True, False]
    with pytest.raises(MemoryError, match=r"fv.config.memory_budget is 4 MiB"):
        fisher.to_dense()


@pytest.mark.parametrize("value", [0, -1, "4 GiB", float("inf"), True])
def test_a_budget_is_a_number_of_bytes(value):
    with pytest.raises(ValueError, match="positive number of bytes"):
        fv.config.memory_budget = value
    assert fv.config.memory_budget is None


def test_a_budget_holds_until_it_is_taken_back():
    fv.config.memory_budget = 3 * 2**30
    try:
        assert "3 GiB" in repr(fv.config)
        assert fv.Probe(nn.Linear(2, 2), "gaussian").fisher(torch.ones(3, 2)).plan().budget == 3 * 2**30
    finally:
        fv.config.memory_budget = None
    assert "free" in repr(fv.config)


def test_a_request_that_is_no_method_is_refused():
    fisher = fv.Probe(nn.Linear(2, 2), "gaussian").fisher(torch.ones(3, 2))
    with pytest.raises(ValueError, match="request must be one of"):
        fisher.plan("inverse")


def test_a_plan_is_a_table_in_a_notebook_and_in_a_terminal():
    plan = made("wide").plan()
    heads, *rows, verdict = repr(plan).splitlines()
    assert heads.split()[:2] == ["what", "how"]
    assert len(rows) == len(plan.steps)
    assert verdict == plan.verdict
    assert human(plan.bytes) in verdict
    assert plan._repr_html_().count("<tr>") == 1 + len(plan.steps)


def test_seconds_follow_the_speed_of_a_product_and_the_cost_of_a_pass():
    plan = made("deep").plan("spectrum")
    assert plan.seconds == pytest.approx(plan.multiply_adds / plan._speed + plan.passes * plan.pass_seconds)
    assert 1e7 < plan._speed < 1e15
