"""Operations as torch's dispatcher sees them: what work costs, the same on every machine.

Counted are matrix products, convolutions, attention, recurrent layers and factorisations, by the shapes of what they
are given; a multiply-add is two operations. Element-wise work, look-ups and copies are not counted. Factorisations of
an n x n matrix count by what textbooks give (Golub & Van Loan, 4th edition), whatever the routine behind them does:
Cholesky n³/3, an inverse 2 n³, eigenvectors 9 n³, singular vectors of (m, n) with m >= n 6 m n² + 20 n³, QR with its
Q 4 m n² - 4/3 n³. Attention counts its products without those that a fused kernel computes twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_counters: list[Counter] = []


class Counter(TorchDispatchMode):
    """Adds up operations; torch's own FlopCounterMode puts hooks on modules, which what calls autograd refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        """So far; a multiply-add is two."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        count = _COUNTS.get(packet)
        if count is None and packet not in flop_registry and _is_composite(func):
            with self:  # inference mode does not take linear and its like apart
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        out = func(*args, **kwargs)
        if count is not None:
            self.operations += count(*pytree.tree_map(_shape, args))
        elif packet in flop_registry:
            self.operations += flop_registry[packet](*args, **kwargs, out_val=out)
        return out


@contextmanager
def counting() -> Iterator[Counter]:
    """Count what runs inside.

    Yields:
        The counter.
    """
    with Counter() as counter:
        _counters.append(counter)
        try:
            yield counter
        finally:
            _counters.remove(counter)


def is_counting() -> bool:
    """Whether anybody counts."""
    return bool(_counters)


def counted() -> int:
    """Operations that the innermost counter has seen; 0 where nobody counts."""
    return _counters[-1].operations if _counters else 0


@contextmanager
def counted_as(operations: int) -> Iterator[None]:
    """Count what runs inside as so many operations, however many it takes.

    A symmetric product that is halved counts in full: whether it is halved depends on how many rows come together. A
    look for evidence, which only the first passes take, counts as none.

    Args:
        operations: of what runs inside.
    """
    if not _counters:
        yield
        return
    before = counted()
    yield
    _counters[-1].operations = before + operations


def count_too(operations: int) -> None:
    """Count what was done before, and is read here instead of being done again.

    Args:
        operations: that it took.
    """
    if _counters:
        _counters[-1].operations += operations


def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _shape(x: Any) -> Any:
    return x.shape if isinstance(x, torch.Tensor) else x


def _batch(shape: torch.Size) -> int:
    return math.prod(shape[:-2])


def _product(x: torch.Size, y: torch.Size) -> int:
    return 2 * _batch(x) * x[-2] * x[-1] * y[-1]


def _added_product(_: Any, x: torch.Size, y: torch.Size, *args: Any, **kwargs: Any) -> int:
    return _product(x, y)


def _factorisation(cubes: float) -> Callable[..., int]:
    def count(shape: torch.Size, *args: Any, **kwargs: Any) -> int:
        return int(cubes * _batch(shape) * shape[-1] ** 3)

    return count


def _tall(squares: float, cubes: float) -> Callable[..., int]:
    """Of a matrix (m, n): squares m n² + cubes n³ for m >= n."""

    def count(shape: torch.Size, *args: Any, **kwargs: Any) -> int:
        m, n = max(shape[-2:]), min(shape[-2:])
        return int(_batch(shape) * (squares * m * n**2 + cubes * n**3))

    return count


def _solve(left: torch.Size, right: torch.Size, *args: Any, **kwargs: Any) -> int:
    n = left[-1]
    return int(2 / 3 * _batch(left) * n**3) + 2 * n * math.prod(right)


def _triangular_solves(right: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * _batch(right) * right[-2] ** 2 * right[-1]


def _one_triangular_solve(triangle: torch.Size, right: torch.Size, *args: Any, **kwargs: Any) -> int:
    return triangle[-1] * math.prod(right)


def _entries(matrix: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(matrix)


def _added_vector(_: Any, matrix: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(matrix)


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Of scores and their mixture (..., T, d), (..., S, d), (..., S, e)."""
    return 2 * _batch(query) * query[-2] * key[-2] * (query[-1] + value[-1])


def _attention_backward(
    _: Any, query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any
) -> int:
    """Two products for each of both, as without a fused kernel, which computes the scores once more."""
    return 2 * _attention(query, key, value)


def _recurrent(inputs: torch.Size, *weights: Any, times: int = 1) -> int:
    """Of a layer's steps (T, N, ...), by its two matrices."""
    return times * 2 * math.prod(inputs[:2]) * sum(math.prod(shape) for shape in weights[:2])


_aten = torch.ops.aten
_COUNTS: dict[Any, Callable[..., int]] = {
    _aten.addmm_: _added_product,
    _aten.baddbmm_: _added_product,
    _aten.linalg_cholesky_ex: _factorisation(1 / 3),
    _aten.cholesky: _factorisation(1 / 3),
    _aten.cholesky_inverse: _factorisation(2 / 3),
    _aten.linalg_inv_ex: _factorisation(2.0),
    _aten._linalg_eigh: _factorisation(9.0),
    _aten._linalg_svd: _tall(6.0, 20.0),
    _aten.linalg_qr: _tall(4.0, -4 / 3),
    _aten.linalg_lu_factor_ex: _factorisation(2 / 3),
    _aten._linalg_det: _factorisation(2 / 3),
    _aten._linalg_slogdet: _factorisation(2 / 3),
    _aten._linalg_solve_ex: _solve,
    _aten.cholesky_solve: _triangular_solves,
    _aten.linalg_solve_triangular: _one_triangular_solve,
    _aten.mv: _entries,
    _aten.addmv: _added_vector,
    _aten.addmv_: _added_vector,
    _aten.dot: _entries,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    _aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
    _aten.mkldnn_rnn_layer: _recurrent,
    _aten.mkldnn_rnn_layer_backward: partial(_recurrent, times=2),
}
