"""Short trainings, of twins that compute the same function and of optimizers that are saved and go on."""

import copy

import torch

import fisherviz as fv


def trained(optimizer, model, loss, steps=3):
    """Weights (P,) after a few steps of an optimizer of `fv.optim` by name, or one that is made of the model."""
    torch.manual_seed(1)
    model.train()
    made = getattr(fv.optim, optimizer)(model, "gaussian") if isinstance(optimizer, str) else optimizer(model)

    def closure():
        made.zero_grad()
        value = loss(model)
        value.backward()
        return value

    # Hessian-free's later choices are among iterates that are equal to rounding
    for _ in range(1 if isinstance(made, fv.optim.HessianFree) else steps):
        made.step(closure)
    assert all(layer.structured for layer in made.layers)
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def half_squares(x, y):
    """The loss of a Gaussian of variance one."""
    return lambda model: 0.5 * (model(x) - y).square().sum(1).mean()


def assert_resumes(build, model, loss, folder):
    """An optimizer that is saved and loaded into a new one goes on bit for bit."""

    def run(net, optimizer):
        for _ in range(4):
            optimizer.zero_grad()
            loss(net).backward()
            optimizer.step()

    torch.manual_seed(0)
    optimizer = build(model)
    run(model, optimizer)
    again = copy.deepcopy(model)
    other = build(again)
    torch.save(optimizer.state_dict(), folder / "state.pt")
    other.load_state_dict(torch.load(folder / "state.pt", weights_only=False))
    run(model, optimizer)
    run(again, other)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
