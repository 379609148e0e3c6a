"""The forward and backward contract of the optimizers: what counts, what must not be disturbed, what is refused."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fisherviz import optim
from tests.oracles.steps import assert_same, data, loss_backward, matrices, moved, net


def kfac(model, **options):
    return optim.KFAC.paper(
        model, "categorical", **{"rescale": False, "adapt": False, "lr": 0.1, "damping": 0.1} | options
    )


PRESETS = {
    "foof": lambda m, **o: optim.FOOF.paper(m, "categorical", **o),
    "kfac": kfac,
    "kfac-eigenvalues": lambda m, **o: kfac(m, heuristic_damping=False, **o),
    "kfac-tridiagonal": lambda m, **o: kfac(m, inverse="block-tridiagonal", **o),
    "cw-ngd": lambda m, **o: optim.CWNGD.paper(m, "categorical", lr=0.05, damping=0.1, **o),
    "ekfac": lambda m, **o: optim.EKFAC.paper(m, "categorical", **o),
    "tengrad": lambda m, **o: optim.TENGraD.paper(m, "categorical", **o),
    "exact": lambda m, **o: optim.NaturalGradient(m, "categorical", lr=0.1, damping=0.1, **o),
}


def in_place_net():
    model = net()
    return nn.Sequential(*(nn.ReLU(inplace=True) if isinstance(m, nn.Tanh) else m for m in model))


def step_of(model, opt, *batches, before_step=lambda: None):
    start = matrices(model)
    opt.zero_grad()
    for x, y in batches:
        F.cross_entropy(model(x), y).div(len(batches)).backward()
    before_step()
    opt.step()
    return moved(start, matrices(model))


@pytest.mark.parametrize("preset", PRESETS)
def test_user_gradients_stay_bitwise_equal(preset):
    plain, watched = in_place_net(), in_place_net()
    PRESETS[preset](watched)
    keep = PRESETS[preset](watched)  # two optimizers on one model do not disturb each other either
    for model in (plain, watched):
        x, y = data()
        x.requires_grad_()
        F.cross_entropy(model(x), y).backward()
        model.seen = x.grad
    assert torch.equal(plain.seen, watched.seen)
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert keep.k == 0


@pytest.mark.parametrize("preset", ["kfac", "exact"])
def test_the_global_random_state_is_never_consumed(preset):
    model = net()
    opt = PRESETS[preset](model)
    state = torch.get_rng_state()
    step_of(model, opt, data())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("preset", PRESETS)
def test_evaluation_and_unfinished_forwards_never_count(preset):
    disturbed, reference = net(), net()
    one, two = PRESETS[preset](disturbed), PRESETS[preset](reference)
    for seed in (3, 4):
        x, y = data(seed=seed)
        one.zero_grad(), two.zero_grad()
        disturbed.eval()
        disturbed(2 * x)
        F.cross_entropy(disturbed(3 * x), y).backward()  # eval mode: backpropagated, but no training forward
        disturbed.train()
        one.zero_grad()
        with torch.no_grad():
            disturbed(5 * x)
        disturbed(7 * x)  # training mode, never backpropagated
        copy.deepcopy(disturbed)(x).sum().backward()
        F.cross_entropy(disturbed(x), y).backward()
        F.cross_entropy(reference(x), y).backward()
        one.step(), two.step()
    for p, q in zip(disturbed.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_probe_on_the_training_model_is_not_training():
    import fisherviz as fv

    disturbed, reference = net(), net()
    one, two = kfac(disturbed), kfac(reference)
    x, y = data()
    before = matrices(disturbed)
    F.cross_entropy(disturbed(x), y).backward()
    fisher = fv.Probe(disturbed, "categorical").fisher((5 * x, y))
    fv.approximate(fisher, "kfac").to_dense()
    fisher.quadratic(torch.ones(fisher.shape[0], dtype=torch.float64))
    F.cross_entropy(reference(x), y).backward()
    one.step(), two.step()
    assert_same(moved(before, matrices(disturbed)), moved(before, matrices(reference)), 1e-15)


def test_forwards_under_functorch_are_skipped():
    model = net()
    opt = kfac(model, kind="exact")
    other = net()
    two = kfac(other, kind="exact")
    x, y = data()
    parameters = dict(model.named_parameters())
    torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (3 * x,)))(parameters)
    torch.func.vmap(model)(x)
    assert_same(step_of(model, opt, (x, y)), step_of(other, two, (x, y)), 1e-15)


@pytest.mark.parametrize("preset", ["foof", "kfac"])
def test_a_second_backward_through_the_same_graph_does_not_count_twice(preset):
    """Where the Fisher is read from the user's own scores, they add up: test_optim_which_passes_count.py."""
    one, two = net(), net()
    opts = [PRESETS[preset](m, **({"kind": "exact"} if preset == "kfac" else {})) for m in (one, two)]
    x, y = data()
    before = matrices(one)
    loss = F.cross_entropy(one(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    F.cross_entropy(two(x), y).backward()
    for p in two.parameters():
        p.grad.mul_(2)
    for opt in opts:
        opt.step()
    assert_same(moved(before, matrices(one)), moved(before, matrices(two)), 1e-9)


def test_a_modified_output_changes_nothing():
    one, two = net(), net()
    opts = [kfac(m, kind="exact") for m in (one, two)]
    x, y = data()
    before = matrices(one)
    z = one(x)
    z.mul_(1.0).add_(0.0)
    F.cross_entropy(z.sub_(z.detach().mean()), y).backward()
    F.cross_entropy(two(x), y).backward()
    for opt in opts:
        opt.step()
    assert_same(moved(before, matrices(one)), moved(before, matrices(two)), 1e-9)


@pytest.mark.parametrize("preset", ["foof", "kfac", "cw-ngd", "ekfac", "tengrad", "exact"])
def test_passes_since_the_last_step_are_averaged_by_example(preset):
    """Unequal pieces of one batch, each loss weighted by its share, make the same step as the whole."""
    whole, parts = net(), net()
    options = {"kind": "exact"} if preset in ("kfac", "ekfac") else {}
    if preset == "cw-ngd":
        options = {"loss_scale": 1 / 12}
    if preset == "tengrad":
        options = {"loss_scale": 1 / 12}
    one, two = (PRESETS[preset](m, **options) for m in (whole, parts))
    x, y = data(12)
    before = matrices(whole)
    F.cross_entropy(whole(x), y).backward()
    for piece in (slice(0, 5), slice(5, 12)):
        (F.cross_entropy(parts(x[piece]), y[piece], reduction="sum") / 12).backward()
    one.step(), two.step()
    assert_same(moved(before, matrices(parts)), moved(before, matrices(whole)), 1e-8)


@pytest.mark.parametrize("preset", ["foof", "kfac"])
@pytest.mark.parametrize("change", ["clip", "replace", "penalty", "scale"])
def test_changed_gradients_take_the_dense_product(preset, change):
    """Batches of 2 would go by factors on g and a; whatever has changed .grad must show in the step."""
    x, y = data(2)
    steps = []
    for N in (1, 2):
        model = net()
        opt = PRESETS[preset](model, **({"kind": "exact"} if preset == "kfac" else {}))
        before = matrices(model)
        loss = F.cross_entropy(model(x), y)
        penalty = sum(p.square().sum() for p in model.parameters()) if change == "penalty" else 0.0
        (loss + 1e-3 * penalty).backward()
        if change == "clip":
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        elif change == "replace":
            for p in model.parameters():
                p.grad = p.grad * 0.5
        elif change == "scale":
            for p in model.parameters():
                p.grad.mul_(0.5)
        if N == 1:  # the reference: gradients that are certainly no local backward's
            for p in model.parameters():
                p.grad = p.grad.clone()
        opt.step()
        steps.append(moved(before, matrices(model)))
    assert_same(steps[1], steps[0], 1e-12)


def test_factors_on_rows_are_used_where_the_batch_is_small(monkeypatch):
    from fisherviz.optim.preconditioner import Preconditioner

    used = []
    original = Preconditioner.solve_rows
    monkeypatch.setattr(
        Preconditioner,
        "solve_rows",
        lambda s, layer, rows: used.append(layer.name) or original(s, layer, rows),
    )
    model = net()
    step_of(model, optim.FOOF.paper(model, "categorical"), data(1))
    assert used == ["0", "2", "4"]
    used.clear()
    step_of(model, optim.FOOF.paper(model, "categorical"), data(40))
    assert used == []


def test_step_raises_without_statistics():
    model = net()
    opt = kfac(model)
    x, y = data()
    model.eval()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="layer '0' has a gradient but no statistics"):
        opt.step()
    model.train()
    step_of(model, opt, (x, y))
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(x), y).backward()
    opt.zero_grad()
    opt.step()  # no gradients: nothing to do
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = q.grad
    with pytest.raises(RuntimeError, match="no statistics since the last step"):
        opt.step()


@pytest.mark.covering
@pytest.mark.parametrize("T", [1, 3, 11])
@pytest.mark.parametrize("preset", PRESETS)
def test_state_dict_resumes_bit_for_bit(preset, T):
    model = net()
    opt = PRESETS[preset](model, T=T, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    for k in range(2):
        loss_backward(opt, model, *data(2, seed=k))
        opt.step()
        scheduler.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "scheduler": scheduler.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)  # weights only: nothing but tensors and plain containers
    torch.manual_seed(99)
    other = net(seed=5)
    resumed = PRESETS[preset](other, T=T, momentum=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(resumed, 0.9)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    schedule.load_state_dict(saved["scheduler"])
    for k in range(2, 6):
        for m, o, s in ((model, opt, scheduler), (other, resumed, schedule)):
            loss_backward(o, m, *data(2, seed=k))
            o.step()
            s.step()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q), f"step {k}"


def test_states_of_other_methods_and_networks_are_refused():
    model = net()
    opt = kfac(model)
    step_of(model, opt, data())
    with pytest.raises(ValueError, match="state is one of method 'kfac'"):
        optim.FOOF.paper(net(), "categorical").load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match="no state of a fisherviz optimizer"):
        opt.load_state_dict(torch.optim.SGD(model.parameters(), 0.1).state_dict())


def test_a_group_left_to_sgd():
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "approximation": "none", "lr": 0.01},
              {"params": [model[4].weight]}, {"params": [model[4].bias], "approximation": "none"}]  # fmt: skip
    opt = kfac(model, params=groups, kind="exact")
    assert [layer.name for layer in opt.layers] == ["0", "4"]
    assert opt.layers[1].da == 3
    start = [p.detach().clone() for p in model.parameters()]
    step_of(model, opt, data())
    grads = [p.grad for p in model.parameters()]
    for i, lr in ((2, 0.01), (3, 0.01), (5, 0.1)):
        assert torch.allclose(list(model.parameters())[i], start[i] - lr * grads[i], atol=1e-15)
    assert not torch.allclose(model[0].weight, start[0] - 0.1 * grads[0])


def two_dampings(model):
    rest = [*model[2].parameters(), *model[4].parameters()]
    return [{"params": model[0].parameters(), "damping": 10.0}, {"params": rest}]


def test_groups_may_have_their_own_damping_and_schedulers_change_it():
    model, other = net(), net()
    opt = optim.FOOF.paper(model, "categorical", params=two_dampings(model), T=100)
    reference = optim.FOOF.paper(other, "categorical", damping=10.0, T=100)
    first, second = step_of(model, opt, data()), step_of(other, reference, data())
    assert_same(first[:1], second[:1], 1e-12)
    assert not torch.allclose(first[1], second[1])
    opt.param_groups[1]["damping"] = 10.0
    model.load_state_dict(other.state_dict())
    assert_same(step_of(model, opt, data(seed=8)), step_of(other, reference, data(seed=8)), 1e-12)


def test_coupled_layers_need_one_damping():
    model = net()
    opt = kfac(model, inverse="block-tridiagonal", params=two_dampings(model))
    with pytest.raises(ValueError, match="couples layers, which then need one damping"):
        step_of(model, opt, data())


def test_frozen_layers_stay_and_thawed_ones_are_asked_for():
    model = net()
    model[0].requires_grad_(False)
    opt = kfac(model)
    assert step_of(model, opt, data())[0].abs().max() == 0
    model[0].requires_grad_(True)
    loss_backward(opt, model, *data())
    with pytest.raises(RuntimeError, match="frozen when the optimizer was created"):
        opt.step()
    model = net()
    opt = kfac(model)
    step_of(model, opt, data())
    model[2].requires_grad_(False)  # frozen later: no gradient, no step
    opt.zero_grad()
    assert step_of(model, opt, data())[1].abs().max() == 0


class Gain(nn.LayerNorm):
    """A function of its own that no kind of layer describes."""

    def forward(self, x):
        return super().forward(x) * 2


class Mixed(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.first, self.norm, self.drop, self.last = (
            nn.Linear(4, 5),
            Gain(5),
            nn.Dropout(dropout),
            nn.Linear(5, 3),
        )

    def forward(self, x):
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


def test_layers_without_structure_are_preconditioned_by_their_diagonal_said_once():
    import fisherviz as fv

    torch.manual_seed(0)
    model = Mixed().double()
    x, y = data(9)
    opt = kfac(model, kind="exact", heuristic_damping=False)
    diagonal = fv.approximate(fv.Probe(model, "categorical", layers="norm").fisher(x), "diagonal").diagonal()
    start = torch.cat([model.norm.weight, model.norm.bias]).detach().clone()
    with pytest.warns(UserWarning, match="'norm' have no structure; they are preconditioned by the exact diagonal"):
        loss_backward(opt, model, x, y)
    opt.step()
    v = torch.cat([model.norm.weight.grad, model.norm.bias.grad])
    assert torch.allclose(
        torch.cat([model.norm.weight, model.norm.bias]), start - 0.1 * v / (diagonal + 0.1), atol=1e-12
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_backward(opt, model, x, y)
        opt.step()


@pytest.mark.parametrize("case", ["dropout", "batchnorm"])
def test_what_cannot_have_a_diagonal_is_left_plain_said_once(case):
    torch.manual_seed(0)
    model = Mixed(dropout=0.5 if case == "dropout" else 0.0).double()
    if case == "batchnorm":
        model.drop = nn.BatchNorm1d(5).double()
    x, y = data(9)
    opt = kfac(model)
    start = model.norm.weight.detach().clone()
    with pytest.warns(UserWarning, match="left plain") as said:
        loss_backward(opt, model, x, y)
    assert (case == "batchnorm") == any("BatchNorm" in str(w.message) and "couples" in str(w.message) for w in said)
    opt.step()
    assert torch.allclose(model.norm.weight, start - 0.1 * model.norm.weight.grad, atol=1e-15)


def test_attention_to_other_tokens_takes_the_generic_path_and_says_why():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(self.attention(x, x[:, 1:], x[:, 1:], need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    model = Net().double()
    opt = kfac(model)
    x, y = torch.randn(6, 3, 4, dtype=torch.float64), torch.randint(3, (6,))
    with pytest.warns(UserWarning, match="'attention': its queries, keys and values do not come from one tensor"):
        loss_backward(opt, model, x, y)
    opt.step()


def test_models_copy_and_pickle_and_the_optimizer_is_held_weakly():
    model = net()
    opt = kfac(model)
    step_of(model, opt, data())
    twin = copy.deepcopy(model)
    back = pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    x, y = data()
    for other in (twin, back):
        F.cross_entropy(other(x), y).backward()
    assert torch.equal(twin[0].weight.grad, back[0].weight.grad)
    dead = weakref.ref(opt)
    del opt
    gc.collect()
    assert dead() is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    F.cross_entropy(model(x), y).backward()


def test_dropped_graphs_are_forgotten():
    model = net()
    opt = kfac(model)
    for _ in range(5):
        model(data()[0])
    gc.collect()
    assert len(opt._watcher._pending) == 0


def test_an_exception_in_the_forward_leaves_nothing_behind():
    model = net()
    opt = kfac(model, kind="exact")
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 9, dtype=torch.float64))
    other = net()
    assert_same(step_of(model, opt, data()), step_of(other, kfac(other, kind="exact"), data()), 1e-15)


def test_bfloat16_autocast_keeps_float32_statistics():
    torch.manual_seed(0)
    model = net().float()
    opt = kfac(model)
    x, y = data()
    start = matrices(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(x.float()), y)
    loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        opt.step()
    assert all(s.total.dtype == torch.float32 for named in opt.moments.average for s in named.values())
    assert all(bool(torch.isfinite(d).all()) and d.abs().max() > 0 for d in moved(start, matrices(model)))


def test_bfloat16_weights_take_float32_directions():
    model = net().bfloat16()
    opt = optim.FOOF.paper(model, "categorical", lr=0.01)
    x, y = data()
    F.cross_entropy(model(x.bfloat16()), y).backward()
    opt.step()
    assert model[0].weight.dtype == torch.bfloat16
    assert opt.moments.average[0]["A"].total.dtype == torch.float32


def test_closures_and_tuple_outputs():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            z = self.net(x)
            return z, x

    x, y = data()
    model, plain = Pair(), net()
    opt, reference = (
        kfac(model, kind="exact", output=lambda out: out[0]), kfac(plain, kind="exact"),
    )  # fmt: skip

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(model(x)[0], y)
        loss.backward()
        return loss

    before = matrices(plain)
    loss = opt.step(closure)
    assert loss > 0
    F.cross_entropy(plain(x), y).backward()
    reference.step()
    assert_same(moved(before, matrices(model.net)), moved(before, matrices(plain)), 1e-14)


def test_compiled_models_are_refused_and_compiling_afterwards_works():
    with pytest.raises(RuntimeError, match=r"create the optimizer first, then call torch\.compile"):
        kfac(torch.compile(net(), backend="eager"))
    model, other = net(), net()
    opt, reference = kfac(model, kind="exact"), kfac(other, kind="exact")
    compiled = torch.compile(model, backend="eager")
    x, y = data()
    before = matrices(other)
    F.cross_entropy(compiled(x), y).backward()
    F.cross_entropy(other(x), y).backward()
    opt.step(), reference.step()
    assert_same(moved(before, matrices(model)), moved(before, matrices(other)), 1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"damping": -1.0}, "at least 0"),
        ({"momentum": 2.0}, "momentum must be"),
        ({"T": 0}, "T must be a positive whole number"),
        ({"kind": "fisher"}, "kind must be one of"),
        ({"decay": 1.5}, "decay must be"),
        ({"reduction": "median"}, "reduction must be"),
        ({"loss_scale": 0.0}, "loss_scale must be positive"),
        ({"params": [nn.Parameter(torch.zeros(2))]}, "do not belong to the model"),
        ({"params": [{"params": [], "approximation": "some"}]}, "approximation must be 'none'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optim.NaturalGradient(net(), "categorical", "kfac", **{"lr": 0.1, "damping": 0.1} | options)


def test_unknown_methods_and_large_exact_fishers_are_refused():
    with pytest.raises(ValueError, match="did you mean 'kfac'"):
        optim.NaturalGradient(net(), "categorical", "kfacc", lr=0.1, damping=0.1)
    model = nn.Linear(100, 70)
    opt = optim.NaturalGradient(model, "categorical", lr=0.1, damping=0.1)
    with pytest.raises(MemoryError, match="SubsampledNaturalGradient"):
        F.cross_entropy(model(torch.randn(2, 100)), torch.zeros(2, dtype=torch.long)).backward()
    assert opt.k == 0
