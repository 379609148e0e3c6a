"""The workloads W1 to W7: network, data, what fisherviz is asked, what the goal is, and how results are compared.

Results of ours and of a peer are compared as products with one random vector, in torch order of the probed layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import fisherviz as fv
from fisherviz.probe import Probe

DAMPING = 0.1


@dataclass(eq=False)
class Case:
    """A network on a batch.

    Attributes:
        model: the network.
        x: inputs (N, ...).
        y: labels (N,).
        names: the probed layers; None: all.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    names: tuple[str, ...] | None = None
    probe: Probe = field(init=False)
    v: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.probe = fv.Probe(self.model, "categorical", layers=self.names)
        self.probe.look(self.x)
        generator = torch.Generator().manual_seed(2)
        self.v = torch.randn(self.probe.space.size, generator=generator)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The probed parameters."""
        return list(self.probe.parameters().values())

    @property
    def modules(self) -> list[nn.Module]:
        """The probed modules."""
        return [layer.module for layer in self.probe.space.layers]

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The batch as a loader."""
        return [(self.x, self.y)]

    def few(self, n: int) -> Case:
        """The same network on the first n examples."""
        return Case(self.model, self.x[:n], self.y[:n], self.names)

    def copy(self) -> Case:
        """The same with a network of its own: some peers leave hooks behind."""
        return Case(copy.deepcopy(self.model), self.x, self.y, self.names)

    def one_pass(self) -> None:
        """One forward+backward pass of the whole network."""
        self.model.zero_grad()
        z = self.model(self.x)
        nn.functional.cross_entropy(z.flatten(0, -2), self.y.flatten()).backward()

    def matrices(self) -> list[Tensor]:
        """The vector v as one matrix W̄ (d_out, da) per layer."""
        space = self.probe.space
        return [
            piece.reshape(layer.matrix_shape) for layer, piece in zip(space.layers, space.split(self.v), strict=True)
        ]

    def flat(self, matrices: list[Tensor]) -> Tensor:
        """Matrices W̄ as one vector in torch order."""
        return self.probe.space.join([m.reshape(-1) for m in matrices])


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    Attributes:
        name: W1 and so on.
        text: what is computed.
        goal: the goal in `unit`; None: no peer is faster.
        unit: "x" (forward+backward passes) or "ms" (CPU milliseconds).
        make: makes the case; prepared once, not timed.
        ours: the workload.
        product: its result's product with the case's v.
        examples: examples that results are compared on; None: all.
        rounds: rounds of timing.
    """

    name: str
    text: str
    goal: float | None
    unit: str
    make: Callable[[], Case]
    ours: Callable[[Case], Any]
    product: Callable[[Case, Any], Tensor]
    examples: int | None = 40
    rounds: int = 9


def _mlp(widths: list[int], activation: type[nn.Module]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        modules += [nn.Linear(d_in, d_out), activation()]
    return nn.Sequential(*modules[:-1])


def _case(model: Callable[[], nn.Sequential], shape: tuple[int, ...], names: tuple[str, ...] | None = None) -> Case:
    torch.manual_seed(0)
    return Case(model(), torch.randn(*shape), torch.randint(0, 10, shape[:1]), names)


def paper() -> Case:
    """The K-FAC paper's network, its middle four layers."""
    return _case(lambda: _mlp([256, 20, 20, 20, 20, 20, 10], nn.Tanh), (1000, 256), ("2", "4", "6", "8"))


def wide(n: int = 1000) -> Case:
    """Benzing's network."""
    return _case(lambda: _mlp([784, 1000, 1000, 1000, 10], nn.ReLU), (n, 784))


def single() -> Case:
    """A Linear 100→50 with a head."""
    return _case(lambda: _mlp([100, 50, 10], nn.Tanh), (1000, 100), ("0",))


def units() -> Case:
    """A Linear 128→64 with a head."""
    return _case(lambda: _mlp([128, 64, 10], nn.Tanh), (1024, 128), ("0",))


def convolution() -> Case:
    """A Conv 16→16 3×3 on 14×14 with a head."""

    def model() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(16 * 196, 10))

    return _case(model, (512, 16, 14, 14), ("0",))


def kept() -> Case:
    """Benzing's network with the captures of its batch kept."""
    case = wide()
    case.kept = case.probe.fisher(case.x)  # type: ignore[attr-defined]
    case.kept.example_space()  # type: ignore[attr-defined]
    return case


def dense_product(case: Case, matrix: Tensor) -> Tensor:
    """M v."""
    return matrix @ case.v


def itself(case: Case, result: Tensor) -> Tensor:
    """The result is the product."""
    return result


def units_product(case: Case, blocks: Tensor) -> Tensor:
    """Unit blocks (d_out, da, da) times v."""
    return case.flat([torch.einsum("oij,oj->oi", blocks, case.matrices()[0])])


def _kfac(kind: str) -> Callable[[Case], Any]:
    return lambda case: fv.approximate(case.probe.fisher(case.x, kind=kind), "kfac")


def _natural(case: Case) -> Tensor:
    return case.probe.fisher(case.x, case.y, kind="mc").natural_gradient(DAMPING)


WORKLOADS = {
    w.name: w
    for w in [
        Workload("W1", "joint exact Fisher of the four 20×20 layers of 256-20⁵-10, N = 1000", 24, "x",
                 paper, lambda c: c.probe.fisher(c.x).to_dense(), dense_product, rounds=25),
        Workload("W2", "one exact block, Linear 100→50, N = 1000", 230, "ms",
                 single, lambda c: c.probe.fisher(c.x).block("0"), dense_product, rounds=5),
        Workload("W2c", "one exact block, Conv 16→16 3×3 on 14×14, N = 512", 18, "x",
                 convolution, lambda c: c.probe.fisher(c.x).block("0"), dense_product, rounds=5),
        Workload("W3", "Kronecker factors of 784-1000³-10, exact kind, N = 1000", 6, "x",
                 wide, _kfac("exact"), lambda c, r: r @ c.v, rounds=5),
        Workload("W3m", "Kronecker factors of 784-1000³-10, one sampled label, N = 1000", 1.35, "x",
                 wide, _kfac("mc"), lambda c, r: r @ c.v, examples=None),
        Workload("W5", "unit blocks, Linear 128→64, N = 1024, exact kind", 30, "ms",
                 units, lambda c: c.probe.fisher(c.x).units("0"), units_product),
        Workload("W5 inverses", "unit blocks and their damped inverses, Linear 128→64, N = 1024", 65, "ms",
                 units, lambda c: fv.approximate(c.probe.fisher(c.x), "cw-ngd").inverse(DAMPING), lambda c, r: r @ c.v),
        Workload("W6", "exact Fisher times a vector, 784-1000³-10, N = 1000", 1.7, "x",
                 wide, lambda c: c.probe.fisher(c.x) @ c.v, itself),
        Workload("W6 kept", "the same, captures kept from an earlier request", 1.35, "x",
                 kept, lambda c: c.kept @ c.v, itself, examples=None),
        Workload("W7", "damped natural gradient by Woodbury, one sampled label, 784-1000³-10, N = 1000", 2.6, "x",
                 wide, _natural, itself),
        Workload("W7 N=100", "the same, N = 100", 1.7, "x", lambda: wide(100), _natural, itself, rounds=25),
    ]
}  # fmt: skip
