"""Networks drawn at random: the exact Fisher and the steps of optimizers against autograd, one example at a time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fisherviz as fv
from benchmarks.markdown import table
from benchmarks.trust.random_programs import CLASSES, WAYS, D, Program, T, drawn, truth

TITLE = "Networks drawn at random"
LAMBDA = 0.5
TOLERANCE = 1e-8
SECONDS = {False: 45.0, True: 1200.0}
"""For which programs are drawn, in the short half and in the long one; half of them for steps."""
SIZES = (1, 2, 3, 5, 7)

REQUESTS: dict[str, tuple[Callable[[fv.Fisher, Tensor], Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "dense": (lambda f, v: f.to_dense(), lambda F, v: F),
    "product": (lambda f, v: f @ v, lambda F, v: F @ v),
    "diagonal": (lambda f, v: f.diagonal(), lambda F, v: F.diagonal()),
    "norm": (lambda f, v: f.norm(), lambda F, v: F.norm()),
    "quadratic": (lambda f, v: f.quadratic(v), lambda F, v: v @ F @ v),
    "solve": (lambda f, v: f.solve(v, LAMBDA), lambda F, v: torch.linalg.solve(F + LAMBDA * _identity(F), v)),
}
"""What is asked of a new Fisher, and the same of the true matrix."""
METHODS = ("exact", "layer", "diagonal")
"""Of which optimizers step."""


def asked(seed: int) -> dict[str, str]:
    """How each request to a program ends: "right", "refused", or what was wrong."""
    net, chance = drawn(seed)
    n, size = chance.choice(SIZES), chance.choice(SIZES)
    likelihood = chance.choice(("categorical", "gaussian"))
    x = torch.randn(n, T, D, dtype=torch.float64)
    if chance.random() < 0.3:
        x[-1, -1] = 0  # padding
    F, v = truth(net, x, likelihood), torch.randn(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ends = {}
    for name, (ask, expected) in REQUESTS.items():
        fisher = fv.Probe(net, likelihood).fisher([x[i : i + size] for i in range(0, n, size)])
        ends[name] = _end(lambda: ask(fisher, v), expected(F, v))  # noqa: B023 - called at once
    if any(not torch.equal(before[name], value) for name, value in net.state_dict().items()):
        ends["model"] = "changed"
    return ends


def stepped(seed: int) -> dict[str, str]:
    """How three steps of an optimizer on a program end, with batches of any size: one example first, perhaps."""
    net, chance = drawn(seed)
    likelihood, method = chance.choice(("categorical", "gaussian")), chance.choice(METHODS)
    opt = fv.optim.NaturalGradient(net, likelihood, method, lr=1.0, damping=LAMBDA, decay=0.0, kind="exact")
    parameters = list(net.parameters())
    ends = {}
    for k in range(3):
        n = chance.choice(SIZES)
        x = torch.randn(n, T, D, dtype=torch.float64)
        y = torch.randint(CLASSES, (n,)) if likelihood == "categorical" else torch.randn(n, CLASSES).double()
        F = truth(net.eval(), x, likelihood)
        _train(net)
        before = [p.detach().clone() for p in parameters]

        def step(x: Tensor = x, y: Tensor = y) -> Tensor:
            z = net(x)
            if likelihood == "categorical":
                loss = nn.functional.cross_entropy(z, y)
            else:
                loss = 0.5 * (z - y).square().sum(1).mean()
            loss.backward()
            opt.step()
            return _joined([p - old for p, old in zip(parameters, before, strict=True)])  # noqa: B023

        g = torch.autograd.grad(_loss(net.eval(), x, y, likelihood), parameters, allow_unused=True)
        _train(net)
        ends[f"step {k + 1}"] = _end(step, _step(F, g, opt, parameters, method))
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)
        opt.zero_grad()
    return ends


def _loss(net: nn.Module, x: Tensor, y: Tensor, likelihood: str) -> Tensor:
    z = net(x)
    if likelihood == "categorical":
        return nn.functional.cross_entropy(z, y)
    return 0.5 * (z - y).square().sum(1).mean()


def _step(F: Tensor, g: Any, opt: Any, parameters: list[nn.Parameter], method: str) -> Tensor:
    """−(M + λ)⁻¹ g over the parameters that have a gradient, M being F, its layers' blocks, or its diagonal."""
    start, offset = {}, 0
    for p in parameters:
        start[p] = offset
        offset += p.numel()
    there = torch.cat([torch.full((p.numel(),), part is not None) for p, part in zip(parameters, g, strict=True)])
    blocks = torch.zeros_like(F, dtype=torch.bool)
    for layer in opt.layers:
        mine = torch.cat([torch.arange(start[p], start[p] + p.numel()) for p in layer.parameters.values()])
        blocks[mine[:, None], mine[None]] = True
    M = {"exact": F, "layer": F * blocks, "diagonal": torch.diag(F.diagonal())}[method]
    whole = _joined([p.new_zeros(p.shape) if part is None else part for p, part in zip(parameters, g, strict=True)])
    out = torch.zeros_like(whole)
    own = M[there][:, there]
    out[there] = -torch.linalg.solve(own + LAMBDA * _identity(own), whole[there])
    return out


def _train(net: Program) -> None:
    """Training mode, but for the statistics of batches."""
    net.train()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.eval()


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _identity(F: Tensor) -> Tensor:
    return torch.eye(len(F), dtype=F.dtype)


def _end(ask: Callable[[], Any], expected: Tensor) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = torch.as_tensor(ask(), dtype=torch.float64)
        except (ValueError, RuntimeError, NotImplementedError, TypeError, MemoryError) as error:
            told = type(error).__module__ == "builtins" and str(error).endswith(".")
            return "refused" if told else f"{type(error).__name__}: {error}"
    off = float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-300)
    return "right" if off < TOLERANCE else f"off by {off:.1e}"


def measure(long: bool) -> dict[str, Any]:
    """Programs of the seeds 0, 1, ..., as many as there is time for, each asked everything; then steps likewise."""
    found: dict[str, Any] = {"ways": len(WAYS), "requests": list(REQUESTS), "wrong": []}
    for what, run in (("Fishers", asked), ("steps", stepped)):
        counts = {"programs": 0, "right": 0, "refused": 0, "wrong": 0}
        begun, seed = time.monotonic(), 0
        while time.monotonic() - begun < SECONDS[long] / 2:
            ends = run(seed)
            for name, end in ends.items():
                counts[end if end in ("right", "refused") else "wrong"] += 1
                if end not in ("right", "refused"):
                    ways = ", ".join(drawn(seed)[0].ways)
                    found["wrong"].append(f"{what} {seed} ({ways}), {name}: {end}")
            counts["programs"] += 1
            seed += 1
        found[what] = counts
    return found


def broken(found: dict[str, Any]) -> list[str]:
    """What was wrong or raw."""
    return list(found["wrong"])


def words(found: dict[str, Any]) -> list[str]:
    """A paragraph and a table."""
    body = [
        [words, f"{found[what]['programs']:,}", *(f"{found[what][end]:,}" for end in ("right", "refused", "wrong"))]
        for what, words in (
            ("Fishers", f"Fisher: {', '.join(found['requests'])}"),
            ("steps", "three steps each with the exact Fisher, its layers' blocks or its diagonal"),
        )
    ]
    return [
        f"Networks that join one to four of {found['ways']} ways to use layers, drawn at random: in loops, on rows "
        "that the examples choose, on examples sorted by their contents, as experts that get no row, by side doors, "
        "under checkpoints and vmap, with positions first, last, merged with the batch. Batches have one to seven "
        "examples. The truth is that of autograd in float64, one example at a time.",
        table(["asked", "networks", "right", "refused", "wrong"], body),
    ]
