"""Defaults that train, the bounds that they rest on, and the papers' values beside them."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import fisherviz as fv
from benchmarks.defaults import OPTIMIZERS, PROBLEMS, train
from fisherviz import optim
from fisherviz.training.data import Batches
from fisherviz.training.optimizers import make_optimizer
from tests.covering import some
from tests.oracles.steps import closure_of, data, net

PRESETS = {
    "foof": optim.FOOF,
    "kfac": lambda m, **o: optim.KFAC(m, "categorical", rescale=False, adapt=False, **o),
    "cw-ngd": optim.CWNGD,
    "ekfac": optim.EKFAC,
    "tengrad": optim.TENGraD,
    "subsampled": optim.SubsampledNaturalGradient,
    "exact": optim.NaturalGradient,
}
COMPLETE = {"kfac": optim.KFAC, "kbfgs": optim.KBFGS, "hessian-free": optim.HessianFree}


@pytest.fixture(scope="module")
def adam():
    return train(PROBLEMS["digits"], OPTIMIZERS["Adam"][0], 0)["loss"]


# the others in the long run: tests/optim/test_scale.py steps by all of them
QUICK = ("KFAC", "EKFAC", "FOOF", "CWNGD", "TENGraD", "Subsampled", "KBFGS")


@pytest.mark.parametrize("name", some((name for name in OPTIMIZERS if name not in ("Adam", "SGD")), *QUICK))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_default_learns_the_digits_faster_than_adam(name, adam):
    assert train(PROBLEMS["digits"], OPTIMIZERS[name][0], 0)["loss"] < 0.75 * adam


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("Adam", "SGD", "KBFGS")])
def test_every_default_is_bounded(name):
    rule = OPTIMIZERS[name][0](net(), "categorical").rule
    least = 1.0 if name != "KSD" else 0.0  # whose λ is not adapted
    bounds = (0.1, least) if hasattr(rule, "adjust") else (1e-3, 0.0)
    assert (rule.region.kl_clip, rule.region.min_damping) == bounds


# ---- the trust region ----------------------------------------------------------------------------------------------


def one_step(make, dtype, **options):
    """The move and the gradient of one step, flat."""
    model = net().to(dtype)
    x, y = data(12)
    x = x.to(dtype)
    opt = make(model, **options) if make is PRESETS["kfac"] else make(model, "categorical", **options)
    opt.generator.manual_seed(3)
    start = [p.detach().clone() for p in model.parameters()]
    opt.step(closure_of(opt, model, x, y))
    move = torch.cat([(p.detach() - q).flatten() for p, q in zip(model.parameters(), start, strict=True)])
    return move, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", PRESETS)
def test_a_step_is_shortened_to_the_bound_and_no_step_within_it(name, dtype):
    """δᵀFδ of δ = −lr d is −lr δᵀ∇h, a mean Fisher's where the matrix is a sum over 12 examples."""
    given = {"lr": 0.5, "damping": 0.3, "momentum": 0.9, "weight_decay": 0.0}
    free, gradient = one_step(PRESETS[name], dtype, kl_clip=math.inf, **given)
    square = -0.5 * float(free @ gradient) / (12 if name == "cw-ngd" else 1)
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    for kl_clip in (square / 9, 2 * square):
        move, _ = one_step(PRESETS[name], dtype, kl_clip=kl_clip, **given)
        torch.testing.assert_close(move, free * min(1.0, math.sqrt(kl_clip / square)), **tolerance)


def test_weight_decay_is_part_of_what_is_bounded():
    given = {"lr": 0.5, "damping": 0.3, "momentum": 0.0, "weight_decay": 0.7}
    free, gradient = one_step(optim.FOOF, torch.float64, kl_clip=math.inf, **given)
    start = torch.cat([p.detach().flatten() for p in net().parameters()])
    square = -0.5 * float(free @ (gradient + 0.7 * start))
    move, _ = one_step(optim.FOOF, torch.float64, kl_clip=square / 4, **given)
    torch.testing.assert_close(move, free / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["kfac", "hessian-free"])
def test_steps_of_the_quadratic_model_stay_in_the_region_of_the_exact_fisher(name):
    options = {"tau1": 1.0, "tau2": 1.0, "kind": "exact"} if name == "kfac" else {}
    model, (x, y) = net(), data(12)
    F_ = fv.Probe(model, "categorical").fisher(x).to_dense()
    opt = COMPLETE[name](model, "categorical", damping=0.01, min_damping=0.0, weight_decay=0.0, kl_clip=1e-4, **options)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    opt.step(closure_of(opt, model, x, y))
    move = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    assert float(move @ F_ @ move + 0.01 * move @ move) == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.parametrize("name", ["kfac", "hessian-free"])
def test_lambda_stops_falling_at_its_floor(name):
    model, (x, y) = net(), data(12)
    options = {"T1": 1, "omega1": 0.5} if name == "kfac" else {}
    opt = COMPLETE[name](model, "categorical", damping=1.0, min_damping=0.1, **options)
    step = closure_of(opt, model, x, y)
    seen = []
    for _ in range(12):
        opt.step(step)
        seen.append(opt.lam)
    assert min(seen) == 0.1
    opt.rule.adjust(0.0, 0.05, 0.2)
    assert opt.lam == 0.2


def test_a_floor_without_an_adapted_lambda_is_refused():
    with pytest.raises(ValueError, match=r"min_damping bounds a λ that is adapted \(rescale=True\)"):
        optim.KFAC(net(), "categorical", rescale=False, adapt=False, min_damping=0.1)


@pytest.mark.parametrize("value", [0.0, -1.0, "a", math.nan])
def test_a_bound_is_positive(value):
    with pytest.raises(ValueError, match=r"kl_clip must be a positive number, math\.inf for no bound"):
        optim.FOOF(net(), "categorical", kl_clip=value)


# ---- λ that cannot act ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (optim.KFAC.paper, True),
        (optim.KFAC, False),
        (lambda m, l: optim.KFAC.paper(m, l, damping=1.0), False),
        (lambda m, l: optim.KFAC.paper(m, l, min_damping=150.0), False),
        (lambda m, l: optim.HessianFree(m, l, damping=150.0), False),
        (lambda m, l: optim.HessianFree(m, l, damping=1e30), True),
    ],
)
def test_a_lambda_that_cannot_act_for_a_hundred_steps_is_said_once(make, said):
    model, (x, y) = net(), data(12)
    opt = make(model, "categorical")
    step = closure_of(opt, model, x, y)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            opt.step(step)
    sentences = [str(w.message) for w in found if "times F along the first step" in str(w.message)]
    assert len(sentences) == said
    assert not said or "pass a smaller damping" in sentences[0]


def test_the_advice_for_a_singular_factor_can_be_followed_where_lambda_is_adapted():
    model, (x, y) = net(), data(4)
    opt = optim.KFAC.paper(model, "categorical", damping=0.0, weight_decay=0.0)
    with pytest.raises(RuntimeError, match=r"layer '0'.*damping of at least.* are adapted: pass a larger min_damping"):
        opt.step(closure_of(opt, model, x, y))


# ---- the papers' values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (optim.FOOF.paper, (0.3, 1.0, 0.0)),
        (optim.CWNGD.paper, (1.0, 1e-4, 0.0)),
        (optim.EKFAC.paper, (1e-2, 1e-2, 0.9)),
        (optim.TENGraD.paper, (0.01, 0.1, 0.9)),
        (optim.SubsampledNaturalGradient.paper, (1e-2, 1e-2, 0.0)),
        (optim.KBFGS.paper, (0.3, 0.3, 0.9)),
        (optim.HessianFree.paper, (1.0, 1.0, 0.0)),
        (optim.KSD.paper, (1.0, 1.0, 0.0)),
        (optim.KFAC.paper, (1.0, 150.0, 0.0)),  # momentum is the rule's
        (lambda m, l: optim.KFAC.paper(m, l, rescale=False, adapt=False), (1.0, 150.0, 0.0)),
    ],
)
def test_the_paper_s_values_have_no_bounds(make, values):
    opt = make(net(), "categorical")
    group = opt.param_groups[0]
    assert (group["lr"], group["damping"], group["momentum"]) == values
    assert (opt.rule.region.kl_clip, opt.rule.region.min_damping) == (math.inf, 0.0)
    assert getattr(opt.rule, "momentum", True)


def test_options_go_before_the_paper_s_values():
    opt = optim.KFAC.paper(net(), "categorical", damping=2.0, min_damping=0.5)
    assert (opt.lam, opt.rule.region.min_damping, opt.rule.region.kl_clip) == (2.0, 0.5, math.inf)


def test_a_learning_rate_of_one_s_own_brings_no_bounds_into_natural_gradient():
    opt = optim.NaturalGradient(net(), "categorical", "kfac", lr=0.2, damping=0.1)
    assert opt.rule.region.kl_clip == math.inf
    assert opt.param_groups[0]["momentum"] == 0.0
    with pytest.raises(TypeError, match="damping must be a number"):
        optim.NaturalGradient(net(), "categorical", "kfac", lr=0.2)


@pytest.mark.parametrize(
    "name", some((name for name in OPTIMIZERS if OPTIMIZERS[name][1]), "KFAC", "FOOF", "TENGraD", "HessianFree")
)
@pytest.mark.filterwarnings("ignore:λ = 150")
def test_states_saved_before_the_bounds_go_on_bit_for_bit(name):
    """They have no region; lr, damping and momentum are in their groups."""
    trained, paper = OPTIMIZERS[name]
    model, (x, y) = net(), data(24)
    opt = paper(model, "categorical")
    for _ in range(3):
        opt.step(closure_of(opt, model, x, y))
    state = copy.deepcopy(opt.state_dict())
    state["fisherviz"] = {key: value for key, value in state["fisherviz"].items() if key != "region"}
    other = net()
    other.load_state_dict(model.state_dict())
    resumed = (paper if name == "TENGraD" else trained)(other, "categorical")  # whose kind is its paper's
    resumed.load_state_dict(state)
    for _ in range(4):
        opt.step(closure_of(opt, model, x, y))
        resumed.step(closure_of(resumed, other, x, y))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_bound_of_one_s_own_is_saved():
    opt = optim.FOOF(net(), "categorical", kl_clip=1e-5)
    other = optim.FOOF(net(), "categorical")
    x, y = data()
    F.cross_entropy(opt.model(x), y).backward()
    opt.step()
    other.load_state_dict(opt.state_dict())
    assert other.rule.region.kl_clip == 1e-5


def test_training_takes_the_paper_s_values_where_asked():
    x, y = data()
    for defaults, lr in (("training", 0.1), ("paper", 0.3)):
        made = make_optimizer("foof", {}, net(), "categorical", Batches(x, y, 6), defaults)
        assert made.param_groups[0]["lr"] == lr
        kept = make_optimizer("foof", {"lr": 7.0}, net(), "categorical", Batches(x, y, 6), defaults)
        assert kept.param_groups[0]["lr"] == 7.0
