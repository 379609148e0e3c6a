"""Gradients of a layer as unit-order matrices, and directions of low rank that are never written down first.

A layer's direction is often c · base + leftᵀ right with fewer rows than the layer is wide (Martens & Grosse 2015, end
of section 8; Benzing 2021, eq. 21). One product straight into the weights saves a matrix of their size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from fisherviz.network.layers import Layer
from fisherviz.optim.watcher import at_least_float32


@dataclass(frozen=True, eq=False)
class LowRank:
    """c · base + leftᵀ right for one parameter.

    Attributes:
        left: (R, d_out).
        right: (R, columns).
        shape: the parameter's, d_out x columns entries.
        base: a tensor of that shape; None: zero.
        weight: c.
    """

    left: Tensor
    right: Tensor
    shape: torch.Size
    base: Tensor | None = None
    weight: float = 1.0

    def add_to(self, target: Tensor, scale: float, keep: float = 1.0) -> None:
        """Target ← keep · target + scale · self, in place; the target is contiguous."""
        if self.base is not None:
            if keep != 1.0:
                target.mul_(keep)
            target.add_(self.base, alpha=scale * self.weight)
            keep = 1.0
        target.view(self.left.shape[1], -1).addmm_(self.left.mT, self.right, beta=keep, alpha=scale)

    def dense(self) -> Tensor:
        """The direction written down."""
        product = (self.left.mT @ self.right).reshape(self.shape)
        return product if self.base is None else product.add_(self.base, alpha=self.weight)


Direction = Tensor | LowRank
Tensors = dict[nn.Parameter, Tensor]
Moves = dict[nn.Parameter, Direction]


def parts_of(direction: Direction) -> list[Tensor]:
    """What a direction is made of."""
    if isinstance(direction, LowRank):
        return [part for part in (direction.left, direction.right, direction.base) if part is not None]
    return [direction]


def dense(direction: Direction) -> Tensor:
    """A direction written down, if it is not."""
    return direction.dense() if isinstance(direction, LowRank) else direction


def inner(direction: Direction, v: Tensor) -> float:
    """⟨direction, v⟩."""
    if isinstance(direction, LowRank):
        left = direction.left @ v.reshape(direction.left.shape[1], -1).to(direction.left.dtype)
        total = summed_products([(left.reshape(-1), direction.right.reshape(-1))])
        return total if direction.base is None else total + direction.weight * inner(direction.base, v)
    return summed_products([(direction.reshape(-1), v.reshape(-1))])


def summed_products(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Σ aᵀb of flat tensors: each by one BLAS product, their sum in float64.

    Of gradients below 1e-19 the products vanish in float32, of those above 1e19 they overflow: all is float64 there.
    """
    if not pairs:
        return 0.0
    total = float(torch.stack([torch.dot(a, b) for a, b in pairs]).double().sum())
    range_of = torch.finfo(pairs[0][0].dtype)
    if _FAR * range_of.tiny < abs(total) <= range_of.max:
        return total
    return sum(float(torch.dot(a.double(), b.double())) for a, b in pairs)


_FAR = 2.0**40
"""How far from the smallest numbers of its type a sum must be for those that vanished not to matter."""


def balanced(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both times a power of two that brings their largest entry near 1: their products do not vanish."""
    exponent = torch.frexp(torch.maximum(s.abs().max(), y.abs().max())).exponent.clamp(-_MOST, _MOST)
    return torch.ldexp(s, -exponent), torch.ldexp(y, -exponent)


_MOST = 126
"""Powers of two that float32 has either way."""


def add_direction(target: Tensor, direction: Direction, scale: float, keep: float = 1.0) -> None:
    """Target ← keep · target + scale · direction, in place."""
    if isinstance(direction, LowRank):
        direction.add_to(target, scale, keep)
        return
    if keep != 1.0:
        target.mul_(keep)
    target.add_(direction, alpha=scale)


def split_rows(
    layer: Layer, right: Tensor, left: Tensor, bases: dict[nn.Parameter, Tensor] | None = None, weight: float = 1.0
) -> Moves:
    """The parameters' shares of weight · bases + leftᵀ right.

    Args:
        layer: a structured layer.
        right: (R, da), the bias's column last.
        left: (R, d_out).
        bases: what is added, by parameter; None and those that are missing: nothing.
        weight: its factor.

    Returns:
        One direction per parameter, written down where a parameter's layout or type asks for it.
    """
    out: Moves = {}
    for part in layer.parts:
        p, columns = layer.parameters[part.name], right[:, part.columns]
        base = (bases or {}).get(p)
        if part.stored is None:
            made = LowRank(left, columns, p.shape, base, weight)
            out[p] = made if p.dtype == right.dtype and p.is_contiguous() else made.dense().to(p.dtype)
        else:
            product = part.as_entries(left.mT @ columns).view(p.shape)
            out[p] = (product if base is None else product.add_(base, alpha=weight)).to(p.dtype)
    return out


def gradient_matrix(layer: Layer, weight_decay: Mapping[nn.Parameter, float]) -> Tensor:
    """The layer's gradient plus weight decay, (d_out, da) with the bias last; (1, P) for generic layers.

    Missing gradients count as zero.
    """
    return matrix_of(layer, layer_gradients(layer, weight_decay))


def layer_gradients(layer: Layer, weight_decay: Mapping[nn.Parameter, float]) -> dict[nn.Parameter, Tensor]:
    """The layer's gradients plus weight decay, by parameter; parameters without one are left out."""
    gradients = {}
    for p in layer.parameters.values():
        if p.grad is None:
            continue
        if p.grad.is_sparse:
            raise RuntimeError(
                f"layer {layer.name!r} has a sparse gradient, which no approximation takes; "
                "put it in a group with approximation='none'."
            )
        gradients[p] = p.grad.add(p, alpha=weight_decay[p]) if weight_decay.get(p) else p.grad
    return gradients


def matrix_of(layer: Layer, tensors: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """Tensors of a layer's parameters as one (d_out, da) matrix with the bias last; missing ones are zero."""
    parts = []
    for part in layer.parts:
        p = layer.parameters[part.name]
        parts.append(part.as_matrix(at_least_float32(tensors[p] if p in tensors else torch.zeros_like(p)).reshape(-1)))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def split_matrix(layer: Layer, direction: Tensor) -> dict[nn.Parameter, Tensor]:
    """The parameters' shares of a direction (d_out, da) or (P,) in unit order."""
    matrix, out = direction.reshape(layer.matrix_shape), {}
    for part in layer.parts:
        p = layer.parameters[part.name]
        out[p] = part.as_entries(matrix[:, part.columns]).reshape(p.shape).to(p.dtype)
    return out


def rows_explain(layer: Layer, a: Tensor, g: Tensor, exact: float = 32.0) -> bool:
    """Whether `.grad` is gᵀ a to rounding, and no hook of the user's may have made it something else.

    Looked at in two ways: all of it times one vector of random signs, which a change of single units' rows does not
    survive, and entry by entry on a few units, where a small penalty on all weights shows.
    """
    gradients = []
    for part in layer.parts:
        p = layer.parameters[part.name]
        if p.grad is None or p._backward_hooks or p._post_accumulate_grad_hooks:
            return False
        gradients.append(part.as_matrix(at_least_float32(p.grad).reshape(-1)))
    rounding = exact * torch.finfo(a.dtype).eps
    signs = _signs(a.shape[1], a.dtype, a.device)
    parts = signs.split([gradient.shape[1] for gradient in gradients])
    gap = torch.mv(g.mT, torch.mv(a, signs))
    for gradient, signed in zip(gradients, parts, strict=True):
        gap.addmv_(gradient, signed, alpha=-1)
    inputs, outputs = a.abs(), g.abs()
    if not bool((gap.abs_() <= rounding * torch.mv(outputs.mT, inputs.sum(1))).all()):
        return False
    every = slice(None, None, max(1, layer.d_out // 4))
    few = torch.cat([gradient[every] for gradient in gradients], 1)
    few.addmm_(g[:, every].mT, a, alpha=-1)
    return bool((few.abs_() <= rounding * (outputs[:, every].mT @ inputs)).all())


@lru_cache(maxsize=64)
def _signs(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random signs, the same for every call."""
    generator = torch.Generator().manual_seed(n)
    return (torch.randint(2, (n,), generator=generator, device="cpu") * 2 - 1).to(device=device, dtype=dtype)
