"""Outputs that the user's loss leaves out (padding, a prompt, the last token of a shifted loss) are in no Fisher.

The optimizers are told by the loss's own gradient, and so is what the loss is a mean over.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fisherviz import Categorical, optim
from tests.covering import some
from tests.oracles import nets, positions
from tests.oracles.checks import assert_matches
from tests.oracles.steps import closure_of

CLASSES, LAMBDA = 4, 0.3


class Attention(nn.Module):
    """Each token reads those before it."""

    def __init__(self):
        super().__init__()
        self.value, self.head = nn.Linear(3, 3), nn.Linear(3, CLASSES)

    def forward(self, x):
        later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        weights = (x @ x.mT).masked_fill(later, -torch.inf).softmax(-1)
        return self.head(torch.tanh(x + weights @ self.value(x)))


class Reader(nn.Module):
    """The same of an embedding of what is read as one of nine tokens."""

    def __init__(self):
        super().__init__()
        self.embedding, self.attention = nn.Embedding(9, 3), Attention()

    def forward(self, x):
        return self.attention(self.embedding((4 + 2 * x[..., 0]).long().clamp(0, 8)))


class Second(nn.Module):
    """The classes on the second axis."""

    def forward(self, z):
        return z.movedim(-1, 1)


NETS = {
    "linear": lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, CLASSES)),
    "attention": Attention,
    "reader": Reader,
}
PRESETS = {
    "exact": lambda m: optim.NaturalGradient(m, "categorical", "exact", lr=0.5, damping=LAMBDA, decay=0.5),
    "kfac": lambda m: optim.KFAC(m, "categorical", rescale=False, adapt=False, kind="exact", lr=0.5, damping=LAMBDA),
    "kfac reduce": lambda m: optim.NaturalGradient(
        m, "categorical", "kfac", setting="reduce", kind="exact", lr=0.5, damping=LAMBDA, decay=0.5
    ),
    "kfac deferred": lambda m: optim.NaturalGradient(
        m, "categorical", "kfac", kind="exact", lr=0.5, damping=LAMBDA, decay=0.5, T=20
    ),
    "kfac empirical": lambda m: optim.NaturalGradient(
        m, "categorical", "kfac", kind="empirical", lr=0.5, damping=LAMBDA, decay=0.5
    ),
    "kfac-full": lambda m: optim.NaturalGradient(
        m, "categorical", "kfac-full", kind="exact", lr=0.5, damping=LAMBDA, decay=0.5
    ),
    "ekfac": lambda m: optim.EKFAC(m, "categorical", kind="exact", lr=0.5, damping=LAMBDA, T=2),
    "foof": lambda m: optim.FOOF(m, "categorical", damping=LAMBDA),
    "cw-ngd": lambda m: optim.CWNGD(m, "categorical", damping=LAMBDA),
    "tengrad": lambda m: optim.TENGraD.paper(m, "categorical", lr=0.5, damping=LAMBDA),
    "sub-sampled": lambda m: optim.SubsampledNaturalGradient(
        m, "categorical", kind="exact", fisher_data="same", lr=0.5, damping=LAMBDA
    ),
    "previous": lambda m: optim.SubsampledNaturalGradient(m, "categorical", kind="exact", lr=0.5, damping=LAMBDA),
    "complete": lambda m: optim.KFAC.paper(m, "categorical", kind="exact", damping=LAMBDA, tau1=1.0, tau2=1.0),
    "hessian-free": lambda m: optim.HessianFree(m, "categorical", damping=LAMBDA, preconditioner="kfac", kind="exact"),
}
presets = pytest.mark.parametrize("preset", PRESETS)


def tokens(n=6, t=4):
    """Inputs, labels and a mask that leaves every example a position."""
    x, y = torch.randn(n, t, 3, dtype=torch.float64), torch.randint(CLASSES, (n, t))
    counted = torch.rand(n, t) < 0.6
    counted[torch.arange(n), torch.randint(t, (n,))] = True
    return x, y, counted


def token_mean(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=-100)


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def train(make, model, data, loss=token_mean, steps=3):
    """The weights after each step on the same batch, and the optimizer."""
    opt, found = make(model), []
    for _ in range(steps):

        def closure():
            opt.zero_grad()
            value = loss(model(data[0]), data[1])
            value.backward()
            return value

        opt.step(closure)
        found.append(flat(model))
    return torch.stack(found), opt


def network(name="linear"):
    return nets.randomised(NETS[name]()).train()


# ---- every optimizer ------------------------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.filterwarnings("ignore:.*chain")
@presets
@pytest.mark.parametrize("name", NETS)
def test_padding_changes_no_step(preset, name):
    torch.manual_seed(0)
    model, (x, y, counted) = network(name), tokens()
    counted[:, -1] = True  # attention: every position acts on one that counts
    y = y.masked_fill(~counted, -100)
    padded = torch.cat([x, 9 * torch.rand(6, 3, 3).double()], 1), F.pad(y, (0, 3), value=-100)
    bare, _ = train(PRESETS[preset], copy.deepcopy(model), (x, y))
    found, _ = train(PRESETS[preset], model, padded)
    assert_matches(found, bare, 1e-7)


@pytest.mark.covering
@pytest.mark.filterwarnings("ignore:.*chain")
@pytest.mark.parametrize(
    "preset", some(PRESETS, "exact", "kfac", "cw-ngd", "tengrad", "previous", "complete", "hessian-free")
)
@pytest.mark.parametrize("shape", [(), (4,)], ids=["labels", "tokens"])
def test_examples_of_which_nothing_counts_change_no_step(preset, shape):
    torch.manual_seed(0)
    model = network()
    x, y = torch.randn(7, *shape, 3, dtype=torch.float64), torch.randint(CLASSES, (7, *shape))
    y[[2, 5]] = -100
    if shape:
        y[[0, 4], [1, 2]] = -100
    left = torch.tensor([0, 1, 3, 4, 6])
    loss = token_mean if shape else F.cross_entropy
    bare, _ = train(PRESETS[preset], copy.deepcopy(model), (x[left], y[left]), loss)
    found, _ = train(PRESETS[preset], model, (x, y), loss)
    assert_matches(found, bare, 1e-7)


def test_k_bfgs_leaves_examples_out():
    torch.manual_seed(0)
    model, x, y = network(), torch.randn(7, 3, dtype=torch.float64), torch.randint(CLASSES, (7,))
    y[[2, 5]] = -100
    left = torch.tensor([0, 1, 3, 4, 6])
    runs = []
    for data in ((x, y), (x[left], y[left])):
        own = copy.deepcopy(model)
        opt = optim.KBFGS(own, "categorical", data=[data])
        for _ in range(3):
            opt.step(closure_of(opt, own, *data))
        runs.append(flat(own))
    assert_matches(*runs, 1e-7)


# ---- closed forms ---------------------------------------------------------------------------------------------------


def oracle(model, x, y, kind):
    counted = y != -100
    one = [(x[n : n + 1],) for n in range(len(x))]
    return positions.mean(positions.rows(model, one, counted, None if kind == "exact" else y))


LOSSES = {
    "mean over positions": token_mean,
    "mean over examples": lambda z, y: Categorical().nll(z, y).mean(),
    "sum": lambda z, y: Categorical().nll(z, y).sum(),
    "accumulated": lambda z, y: token_mean(z, y) / 8,
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def step_of(make, model, x, y, loss):
    """Gradient, and how one step of lr 1 moved the weights."""
    before, opt = flat(model), make(model)
    loss(model(x), y).backward()
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    opt.step()
    return g, flat(model) - before


@pytest.mark.covering(2)
@losses
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_step_of_an_embedding_and_a_head(kind, loss, dtype):
    """F is the mean over examples of sums over positions, whatever the loss is a mean over."""
    torch.manual_seed(0)
    model = nets.randomised(nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, CLASSES))).train()
    _, y, counted = tokens()
    x, y = torch.randint(7, (6, 4)), y.masked_fill(~counted, -100)
    expected = oracle(model, x, y, kind)
    g, moved = step_of(
        lambda m: optim.NaturalGradient(m, "categorical", "exact", kind=kind, lr=1.0, damping=LAMBDA),
        model.to(dtype), x, y, loss,
    )  # fmt: skip
    damped = expected + LAMBDA * torch.eye(len(g)).double()
    assert_matches(moved, -torch.linalg.solve(damped, g.double()), 1e-9 if dtype == torch.float64 else 1e-4)


@losses
def test_the_step_of_blocks_from_the_loss_s_scores(loss):
    model, (x, y, counted) = network(), tokens()
    y = y.masked_fill(~counted, -100)
    expected = oracle(model, x, y, "empirical")
    g, moved = step_of(lambda m: optim.TENGraD.paper(m, "categorical", lr=1.0, damping=LAMBDA), model, x, y, loss)
    for part in (slice(0, 12), slice(12, 28)):
        damped = expected[part, part] + LAMBDA * torch.eye(part.stop - part.start).double()
        assert_matches(moved[part], -torch.linalg.solve(damped, g[part]))


def test_a_given_loss_scale_is_taken():
    model, (x, y, _) = network(), tokens()
    steps = [
        step_of(
            lambda m, c=c: optim.TENGraD.paper(m, "categorical", lr=1.0, damping=LAMBDA, loss_scale=c),
            copy.deepcopy(model), x, y, token_mean,
        )[1]
        for c in (None, 1 / 24, 1 / 6)
    ]  # fmt: skip
    assert_matches(steps[0], steps[1])
    assert (steps[0] - steps[2]).norm() > 1e-3 * steps[0].norm()


@losses
def test_the_quadratic_model_has_the_curvature_of_the_loss(loss):
    """δᵀ(cN F + (λ + η) I)δ, of the loss c Σ nll."""
    model, (x, y, counted) = network(), tokens()
    y = y.masked_fill(~counted, -100)
    expected, before = oracle(model, x, y, "exact"), flat(model)
    c = float((loss(model(x), y) / Categorical().nll(model(x), y).sum()).detach())
    found, opt = train(PRESETS["complete"], model, (x, y), loss, steps=1)
    delta = found[0] - before
    curvature = delta @ (c * len(x) * expected @ delta + (LAMBDA + 1e-5) * delta)
    assert opt.last["quadratic"] == pytest.approx(float(curvature), rel=1e-7)
    assert opt.last["linear"] == pytest.approx(-opt.last["quadratic"], rel=1e-7)  # the minimum along it


@pytest.mark.covering
@losses
@pytest.mark.parametrize("mode", ["forward", "example space"])
def test_hessian_free_solves_with_the_curvature_of_the_loss(monkeypatch, loss, mode):
    if mode == "example space":
        monkeypatch.setattr(
            "fisherviz.optim.quadratic.try_forward_mode", lambda network, _: network.note(forward_mode=False)
        )
    model, (x, y, counted) = network(), tokens()
    y = y.masked_fill(~counted, -100)
    expected, before = oracle(model, x, y, "exact"), flat(model)
    c = float((loss(model(x), y) / Categorical().nll(model(x), y).sum()).detach())
    g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(loss(model(x), y), list(model.parameters()))])
    found, opt = train(
        lambda m: optim.HessianFree(m, "categorical", damping=LAMBDA, iterations=100, tolerance=0.0),
        model, (x, y), loss, 1,
    )  # fmt: skip
    damped = c * len(x) * expected + LAMBDA * torch.eye(len(g)).double()
    assert opt.last["chosen"] > 20
    assert_matches((found[0] - before) / opt.last["step"], -torch.linalg.solve(damped, g), 1e-5)


def test_a_share_of_the_batch_is_one_of_examples_that_count():
    torch.manual_seed(0)
    x, y, _ = tokens(n=8)
    y[:3], y[4:] = -100, -100  # one example is left: every subset is that one
    model = network()
    whole, part = (
        train(
            lambda m, share=share: optim.KFAC.paper(
                m, "categorical", kind="exact", damping=LAMBDA, tau1=share, tau2=share
            ),
            copy.deepcopy(model), (x, y),
        )[0]
        for share in (1.0, 1 / 8)
    )  # fmt: skip
    assert_matches(part, whole, 1e-7)


# ---- which outputs a loss counts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["exact", "kfac", "foof", "tengrad", "complete"])
def test_a_shifted_loss_leaves_out_the_last_token(preset):
    model, (x, y, _) = network("attention"), tokens()

    def shifted(z, labels):
        return F.cross_entropy(z[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    moved = F.pad(y, (0, 1), value=-100)[:, 1:]
    one, _ = train(PRESETS[preset], copy.deepcopy(model), (x, y), shifted)
    other, _ = train(PRESETS[preset], model, (x, moved))
    assert_matches(one, other, 1e-9)


@pytest.mark.covering
@pytest.mark.parametrize("preset", ["exact", "kfac", "kfac empirical", "tengrad", "foof", "complete"])
@pytest.mark.parametrize("first", ["some", "others"])
def test_two_backwards_through_one_forward_count_what_both_reach(preset, first):
    model, (x, y, counted) = network(), tokens()
    counted[:, 0], counted[:, 1] = True, False  # both reach every example
    whole, _ = train(PRESETS[preset], copy.deepcopy(model), (x, y), lambda z, t: Categorical().nll(z, t).sum() / 12)
    opt = PRESETS[preset](model)
    found, parts = [], [y.masked_fill(~counted, -100), y.masked_fill(counted, -100)]
    for _ in range(3):

        def closure():
            opt.zero_grad()
            z = model(x)
            terms = [Categorical().nll(z, part).sum() / 12 for part in (parts if first == "some" else parts[::-1])]
            terms[0].backward(retain_graph=True)
            terms[1].backward()
            return sum(terms).detach()

        opt.step(closure)
        found.append(flat(model))
    assert_matches(torch.stack(found), whole, 1e-7)


@pytest.mark.parametrize("graph", ["two forwards", "one forward"])
def test_outputs_that_two_losses_reach_count_once_in_a_pass(graph):
    """Their gradients add up, and the Fisher is that of the outputs that either reaches."""
    model, (x, y, _) = network(), tokens()
    parts = [F.pad(y[:, :3], (0, 1), value=-100), F.pad(y[:, 1:], (1, 0), value=-100)]
    expected, before = oracle(model, x, y, "exact"), flat(model)
    opt = optim.NaturalGradient(model, "categorical", "exact", lr=1.0, damping=LAMBDA)
    z = model(x)
    if graph == "two forwards":  # two passes of as many examples, each with its own outputs
        expected = sum(oracle(model, x, part, "exact") for part in parts) / 2
    for part in parts:
        Categorical().nll(model(x) if graph == "two forwards" else z, part).mean().backward(retain_graph=True)
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    opt.step()
    assert_matches(flat(model) - before, -torch.linalg.solve(expected + LAMBDA * torch.eye(len(g)).double(), g))


def test_a_confident_network_does_not_lose_its_examples():
    """Where the softmax is one-hot, the gradient of a label that counts is zero too."""
    model = nets.randomised(nn.Sequential(nn.Linear(2, CLASSES))).train()
    with torch.no_grad():
        model[0].weight.mul_(1e5)
    x = torch.randn(5, 2, dtype=torch.float64)
    opt = optim.NaturalGradient(model, "categorical", "foof", kind="mc", lr=1.0, damping=0.1)
    F.cross_entropy(model(x), model(x).argmax(1)).backward()
    assert not model[0].weight.grad.any()
    assert opt.moments.examples == 5


@pytest.mark.parametrize("preset", some(PRESETS, "exact", "kfac", "tengrad", "previous", "complete", "hessian-free"))
def test_a_loss_of_which_nothing_counts_is_a_step_of_weight_decay_alone(preset):
    model, (x, y, _) = network(), tokens()
    before, nothing = flat(model), (x, torch.full_like(y, -100))
    found, opt = train(PRESETS[preset], model, nothing, lambda z, t: Categorical().nll(z, t).sum())
    shrunk = 1 - opt.param_groups[0]["lr"] * opt.param_groups[0]["weight_decay"]
    assert_matches(found, torch.stack([before * shrunk**k for k in (1, 2, 3)]))
    found, _ = train(lambda _: opt, model, (x, y))
    assert float((found[0] - before).norm()) > 1e-3 * float(before.norm())


@pytest.mark.parametrize("likelihood", [Categorical(class_axis=1), nn.CrossEntropyLoss()])
def test_the_wrong_axis_is_told_by_the_loss(likelihood):
    model, (x, y, _) = network(), tokens()
    opt = optim.FOOF(model, likelihood)
    with pytest.raises(ValueError, match=r"gradient says .* axis -1, not 1; pass fv\.Categorical\(\)"):
        token_mean(model(x), y).backward()
    assert opt.k == 0


def test_the_mean_over_positions_is_advised_into_the_sum():
    model, (x, y, _) = nn.Sequential(network(), Second()), tokens()
    opt = optim.KFAC(model, nn.CrossEntropyLoss(ignore_index=0), rescale=False, adapt=False)
    with pytest.raises(
        ValueError, match=r"pass the sum: .* fv\.Categorical\(class_axis=1, ignore_index=0\) for the second"
    ):
        F.cross_entropy(model(x), y).backward()
    assert opt.k == 0


@pytest.mark.parametrize("preset", ["cw-ngd", "tengrad", "complete", "hessian-free"])
def test_a_loss_whose_scale_cannot_be_told_is_refused(preset):
    model, (x, y, _) = network(), tokens()
    opt = PRESETS[preset](model)
    with pytest.raises(ValueError, match=r"no multiple of the categorical scores .* loss_scale=c"):
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), label_smoothing=0.2).backward()
    assert opt.k == 0


def test_a_smoothed_loss_trains_where_its_scale_does_not_matter():
    model, (x, y, _) = network(), tokens()
    opt = PRESETS["kfac"](model)
    F.cross_entropy(model(x).flatten(0, 1), y.flatten(), label_smoothing=0.2).backward()
    opt.step()
    opt = optim.TENGraD.paper(model, "categorical", loss_scale=1 / 24)
    F.cross_entropy(model(x).flatten(0, 1), y.flatten(), label_smoothing=0.2).backward()
    opt.step()


@pytest.mark.filterwarnings("error")
def test_accumulation_is_told_from_the_losses():
    """Parts of a batch whose losses are divided by hand: no loss_scale is asked for."""
    model, (x, y, counted) = network(), tokens()
    y = y.masked_fill(~counted, -100)
    expected, before = oracle(model, x, y, "empirical"), flat(model)
    opt = optim.NaturalGradient(model, "categorical", "exact", kind="empirical", lr=1.0, damping=LAMBDA)
    for part in (slice(0, 2), slice(2, 6)):
        (Categorical().nll(model(x[part]), y[part]).sum() / counted.sum()).backward()
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    opt.step()
    assert_matches(flat(model) - before, -torch.linalg.solve(expected + LAMBDA * torch.eye(len(g)).double(), g))


@pytest.mark.parametrize(
    "preset",
    some(["cw-ngd", "tengrad", "previous", "kfac deferred", "ekfac", "complete"], "cw-ngd", "previous", "complete"),
)
def test_training_goes_on_from_a_saved_state(preset, tmp_path):
    torch.manual_seed(0)
    model, (x, y, counted) = network(), tokens()
    data = x, y.masked_fill(~counted, -100)
    _, opt = train(PRESETS[preset], model, data)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = network()
    other.load_state_dict(saved["model"])

    def resumed(own):
        made = PRESETS[preset](own)
        made.load_state_dict(saved["opt"])
        return made

    assert torch.equal(train(lambda _: opt, model, data)[0], train(resumed, other, data)[0])


def test_a_fisher_s_own_data_leave_out_what_their_targets_do():
    model, (x, y, counted) = network(), tokens()
    y = y.masked_fill(~counted, -100)
    expected = oracle(model, x, y, "exact")
    other, labels, _ = tokens()
    g, moved = step_of(
        lambda m: optim.SubsampledNaturalGradient.paper(
            m, "categorical", kind="exact", fisher_data=[(x, y)], lr=1.0, damping=LAMBDA
        ),
        model, other, labels, token_mean,
    )  # fmt: skip
    assert_matches(moved, -torch.linalg.solve(expected + LAMBDA * torch.eye(len(g)).double(), g))
