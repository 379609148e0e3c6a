"""CW-NGD in float32 beside sums whose rounding is larger than the damping: the steps of float64.

Weights start at zero and targets are small whole numbers, N a power of two, so that inputs and scores are exact in
float32 and the oracle starts from the same numbers.
"""

import pytest
import torch
from torch import nn

from fisherviz import optim
from fisherviz.approximations.example_units import ExampleUnits
from fisherviz.capture.captures import Capture

EPS = torch.finfo(torch.float32).eps


def whole(*shape, low=-8, high=9, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


def step(model, x, y, damping):
    """The change of the weights by one step, and the gradient that it was made from."""
    for p in model.parameters():
        nn.init.zeros_(p)
    opt = optim.CWNGD.paper(model, "gaussian", damping=damping)
    loss = (model(x) - y).square().sum() / 2 / len(x)
    loss.backward()
    gradient = [p.grad.double() for p in (model[0].weight, model[0].bias)]
    opt.step()
    moved = torch.cat([p.detach().double().reshape(len(p), -1) for p in (model[0].weight, model[0].bias)], 1)
    return moved, torch.cat([g.reshape(len(g), -1) for g in gradient], 1)


def dense_step(rows, gradient, damping):
    """−(Σ_n v_no v_noᵀ + γ)⁻¹ of the mean gradient for each unit o, from rows (d_out, N, da) in float64."""
    out, largest = [], 0.0
    for V, v in zip(rows, gradient, strict=True):
        B = V.T @ V
        largest = max(largest, float(torch.linalg.eigvalsh(B)[-1]))
        out.append(-torch.linalg.solve(B + damping * torch.eye(len(B), dtype=torch.float64), v))
    return torch.stack(out), largest


@pytest.mark.parametrize("N", [16, 64])
@pytest.mark.parametrize("damping", [1e-4, 1e-2, 100.0])
def test_linear_steps_are_those_of_float64(N, damping):
    x = whole(N, 6, low=-2, high=3) @ whole(6, 24, low=-2, high=3, seed=1)  # rank 6 of 24
    y = whole(N, 3, seed=2)
    found, gradient = step(nn.Sequential(nn.Linear(24, 3)), x, y, damping)
    a = torch.cat([x, torch.ones(N, 1)], 1).double()
    expected, largest = dense_step([-y[:, o : o + 1].double() * a for o in range(3)], gradient, damping)
    assert 1e4 < largest < 1e6
    assert largest * EPS > 1e-4  # float32's rounding of the blocks is above the smallest damping
    # float64 inside: rounding of the result alone; float32 only where it rounds below 1/100 of the damping
    assert (found - expected).norm() < (4 * EPS if damping < 1 else 1e-2) * expected.norm()


def test_convolutional_steps_are_those_of_float64():
    model = nn.Sequential(nn.Conv2d(2, 3, 2, stride=2), nn.Flatten())
    x, y = whole(32, 2, 4, 4), whole(32, 12, seed=2)
    x[:, 1] = 2 * x[:, 0]  # half the rank
    found, gradient = step(model, x, y, 1e-4)
    patches = nn.functional.unfold(x, 2, stride=2).double().transpose(1, 2)  # (N, T, 8)
    a = torch.cat([patches, torch.ones(32, 4, 1)], 2)
    rows = [torch.einsum("nt,nti->ni", -y.double().reshape(32, 3, 4)[:, o], a) for o in range(3)]
    expected, largest = dense_step(rows, gradient, 1e-4)
    assert 1e4 < largest < 1e6
    assert (found - expected).norm() < 4 * EPS * expected.norm()


@pytest.mark.parametrize("damping", [10.0**i for i in range(-5, 5)])
def test_a_solve_in_float32_loses_at_most_a_hundredth(damping):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(60, 1, 20, generator=generator) + 3.0
    a[..., 10:] = a[..., :10]  # singular without damping
    capture = Capture(a, torch.randn(1, 60, 1, 4, generator=generator))
    v = torch.randn(80, generator=generator)
    found = ExampleUnits(capture, 1.0, damping).solve(v)
    rows = capture.g[0, :, 0].double().T.unsqueeze(2) * capture.a[:, 0].double()
    B = rows.mT @ rows + damping * torch.eye(20, dtype=torch.float64)
    expected = torch.linalg.solve(B, v.double().reshape(4, 20)).reshape(-1)
    assert found.dtype == torch.float32
    assert (found.double() - expected).norm() < 1e-2 * expected.norm()
