"""Do iterative inverses and factors of low rank pay on a CPU? K-FAC's factors of a network in training.

Martens & Grosse 2015 (section 8, appendix B) name Newton's iteration X ← X (2I − M X), started from the inverse of some
steps ago (Pan & Schreiber 1991), and Smith's for the block-tridiagonal inverse, U ← U + P U Q, P ← P², Q ← Q². Both are
products of matrices alone. Factors of low rank plus a multiple of the identity are estimated online by Le Roux et al.
2008 (TONGA) and Povey et al. 2015: here the best that any of them can be, the leading eigenpairs of the factor itself
with the mean of the others. `python -m benchmarks.hot_start` prints operations and CPU time on one thread of each
beside the factorisation that fisherviz uses.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import fisherviz as fv
from fisherviz import datasets

BATCH, DECAY, PERIOD = 100, 0.95, 20


def factors(width: int, steps: int, seed: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Averages of A, G and their cross moments of two neighbouring width × width layers, after every step of K-FAC."""
    torch.manual_seed(seed)
    inputs, targets = datasets.load("digits").train
    net = nn.Sequential(
        nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
        nn.Linear(width, 10),
    )  # fmt: skip
    optimizer = fv.optim.KFAC(net, "categorical", rescale=False, adapt=False, T=20)
    generator = torch.Generator().manual_seed(seed)
    average: list[Tensor] | None = None
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (BATCH,), generator=generator)
        seen: dict[int, Tensor] = {}
        z = inputs[chosen]
        for i, module in enumerate(net):
            before, z = z, module(z)
            seen |= {i: before, -i: z} if i in (2, 4) else {}
        labels = torch.distributions.Categorical(logits=z.detach()).sample()
        g = torch.autograd.grad(
            nn.functional.cross_entropy(z, labels, reduction="sum"), [seen[-2], seen[-4]], retain_graph=True
        )
        a = [torch.cat([seen[i].detach(), torch.ones(BATCH, 1)], 1) for i in (2, 4)]
        now = [x.T @ y / BATCH for one, two in (a, g) for x, y in ((one, one), (one, two), (two, two))]
        keep = 0.0 if average is None else DECAY
        average = [keep * old + (1 - keep) * new for old, new in zip(average or now, now, strict=True)]
        yield tuple(average)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()


def newton(M: Tensor, X: Tensor, tolerance: float, most: int = 60) -> tuple[Tensor, int]:
    """Newton's iteration for M⁻¹ from X, and how many it took to ‖I − M X‖ ≤ tolerance √d; -1: it does not converge."""
    eye = torch.eye(len(M))
    for count in range(most):
        gap = eye - M @ X
        size = float(gap.norm()) / len(M) ** 0.5
        if size <= tolerance:
            return X, count
        if not size < 1e3:
            break
        X = X + X @ gap
    return X, -1


def cpu(work: Callable[[], object], rounds: int = 7) -> float:
    """Least CPU time in milliseconds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return 1e3 * best


def inverted(M: Tensor) -> Tensor:
    """As fisherviz does."""
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(M)[0])


def damped(A: Tensor, G: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Factored Tikhonov damping."""
    return fv.FactoredTikhonov(lam**0.5).factors(A, G)


def smith(P: Tensor, Q: Tensor, tolerance: float, most: int = 40) -> int:
    """Squarings of Smith's iteration until what is left out is below the tolerance."""
    count = 0
    while float(torch.linalg.matrix_norm(P, 2) * torch.linalg.matrix_norm(Q, 2)) > tolerance and count < most:
        P, Q, count = P @ P, Q @ Q, count + 1
    return count


def measure(width: int, steps: int, lam: float) -> str:
    """One row of the table."""
    kept = list(factors(width, steps))
    pairs = [damped(moments[0], moments[3], lam) for moments in kept]
    counts: dict[str, list[int]] = {}
    for T in (1, 20):
        for k in range(steps // 2, steps, max(T, 10)):
            for name, now, before in zip("AG", pairs[k], pairs[k - T], strict=True):
                counts.setdefault(f"{name}{T}", []).append(newton(now, inverted(before), 1e-3)[1])
    M, _ = pairs[-1]
    X = inverted(M)
    gap = torch.eye(len(M)) - M @ X
    once, anew = cpu(lambda: X + X @ (gap - M @ X)), cpu(lambda: inverted(M))
    L_a, L_g = (torch.linalg.cholesky(m.double()) for m in pairs[-1])
    _, A12, A2, _, G12, G2 = (m.double() for m in kept[-1])
    next_a, next_g = damped(A2, G2, lam)
    whiten = [
        torch.linalg.solve_triangular(L, c @ torch.linalg.solve(n, c.T), upper=False)
        for L, c, n in ((L_a, A12, next_a), (L_g, G12, next_g))
    ]
    P, Q = (torch.linalg.solve_triangular(L, w.T, upper=False) for L, w in zip((L_a, L_g), whiten, strict=True))
    squarings = smith(Q, P, 1e-3)
    decomposed, product = cpu(lambda: torch.linalg.eigh(P), 3), cpu(lambda: P @ P, 3)
    said = [" ".join(map(str, sorted(set(found)))) for found in counts.values()]
    return (
        f"| {width} | {lam:g} | {' / '.join(said)} | {once / anew:.1f} | {anew:.2f} ms | {squarings} | "
        f"{decomposed / product:.0f} |"
    )


def of_low_rank(M: Tensor, rank: int) -> Tensor:
    """The leading eigenpairs of M, and the mean of its other eigenvalues in their place."""
    values, vectors = torch.linalg.eigh(M.double())
    values[:-rank] = values[:-rank].mean()
    return (vectors * values) @ vectors.mT


def renewed(basis: Tensor, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs of decay U diag(s) Uᵀ + (1 − decay) XᵀX / m, by the Gram matrix of what is added up."""
    stacked = torch.cat([basis * (DECAY * values).sqrt(), rows.mT * ((1 - DECAY) / len(rows)) ** 0.5], 1)
    squares, vectors = torch.linalg.eigh(stacked.mT @ stacked)
    rank = basis.shape[1]
    leading = squares[-rank:].clamp_min(1e-12)
    return stacked @ (vectors[:, -rank:] / leading.sqrt()), leading


def measure_rank(width: int, steps: int, lam: float, ranks: list[int]) -> list[str]:
    """Rows of the table of low rank: K-FAC's direction of a layer, for a gradient drawn from the factors."""
    *_, (A, _, _, G, _, _) = factors(width, steps)
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(len(G), len(A), generator=generator, dtype=torch.float64)
    gradient = root(G) @ white @ root(A)
    exact = direction(A.double(), G.double(), gradient, lam)
    rows = torch.randn(BATCH, len(A), generator=generator)
    whole = cpu(lambda: A.lerp(rows.mT @ rows, 1 - DECAY)) + cpu(lambda: inverted(damped(A, G, lam)[0])) / PERIOD
    out = []
    for rank in ranks:
        found = direction(of_low_rank(A, rank), of_low_rank(G, rank), gradient, lam)
        error = float((found - exact).norm() / exact.norm())
        cosine = float((found * exact).sum() / (found.norm() * exact.norm()))
        basis = torch.linalg.qr(torch.randn(len(A), rank, generator=generator))[0]
        update = cpu(lambda basis=basis, rank=rank: renewed(basis, torch.ones(rank), rows))
        out.append(f"| {width} | {lam:g} | {rank} | {error:.2f} | {cosine:.3f} | {update / whole:.1f} |")
    return out


def root(M: Tensor) -> Tensor:
    """The symmetric root of a semidefinite matrix, in float64."""
    values, vectors = torch.linalg.eigh(M.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT


def direction(A: Tensor, G: Tensor, gradient: Tensor, lam: float) -> Tensor:
    """G⁻¹ ∇ A⁻¹, damped."""
    first, second = damped(A, G, lam)
    return torch.linalg.solve(second, torch.linalg.solve(first, gradient.mT).mT)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| d | λ | Newton steps, A and G after 1 and 20 steps | one / anew | anew | Smith | eigh / product |")
    print("|---|---|---|---|---|---|---|")
    for width in given.widths:
        for lam in (0.1, 1e-3):
            print(measure(width, given.steps, lam), flush=True)
    print("| d | λ | rank | error of the direction | cosine | its renewal / the average's and 1/20 of its inverse |")
    print("|---|---|---|---|---|---|")
    for width in given.widths:
        for lam in (0.1, 1e-3):
            ranks = [rank for rank in (10, 30, 100) if rank < width]
            print("\n".join(measure_rank(width, given.steps, lam, ranks)), flush=True)


if __name__ == "__main__":
    main()
