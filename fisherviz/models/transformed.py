"""A network in other coordinates: transformed activities and inputs, whitening, logistic units for tanh.

Martens & Grosse 2015, section 10: s† = W† ā†, ā† = Ω φ̄(Φ s†) with W† = Φ⁻¹ W Ω⁻¹ is the same function of the inputs.
Natural gradients and K-FAC without damping do not depend on the coordinates; gradient descent does.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fisherviz.operators.factorise import cholesky


class Coordinates(nn.Module):
    """Multiplies features by a fixed matrix.

    Args:
        matrix: (d, d).
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to (..., d)."""
        return x @ self.matrix.mT


class Homogeneous(nn.Module):
    """Appends the coordinate 1 that a bias is the weight of."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to (..., d + 1)."""
        return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def transformed(model: nn.Sequential, omegas: Sequence[Tensor], phis: Sequence[Tensor]) -> nn.Sequential:
    """The same function with other coordinates of every layer's inputs and outputs (Martens & Grosse 2015, theorem 1).

    Args:
        model: linear layers with whatever is between them; it stays as it is.
        omegas: Ω of each linear layer's input, (d_in + 1, d_in + 1) where the layer has a bias, else (d_in, d_in).
        phis: Φ of each linear layer's output, (d_out, d_out).

    Returns:
        A network whose linear layers, of the same names, have no biases and the weights Φ⁻¹ W̄ Ω⁻¹.

    Raises:
        ValueError: the matrices do not fit the layers.

    Example:
        >>> import torch
        >>> from fisherviz import models
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
        >>> twin = models.transformed(net, [2 * torch.eye(3), 3 * torch.eye(4)], [torch.eye(3), 5 * torch.eye(1)])
        >>> x = torch.randn(4, 2)
        >>> torch.allclose(twin(x), net(x), atol=1e-6)
        True
    """
    layers = list(_linear(model))
    if not len(layers) == len(omegas) == len(phis):
        raise ValueError(
            f"the network has {len(layers)} linear layers; give as many Ω and Φ, not {len(omegas)} and {len(phis)}."
        )
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    matrices = zip(omegas, phis, strict=True)
    for name, module in model.named_children():
        if not isinstance(module, nn.Linear):
            modules[name] = copy.deepcopy(module)
            continue
        omega, phi = next(matrices)
        whole = homogeneous_weight(module)
        rows, columns = whole.shape
        if omega.shape != (columns, columns) or phi.shape != (rows, rows):
            raise ValueError(
                f"layer {name!r} needs Ω of shape {(columns, columns)} and Φ of shape {(rows, rows)}, got "
                f"{tuple(omega.shape)} and {tuple(phi.shape)}."
            )
        own = nn.utils.skip_init(nn.Linear, columns, rows, bias=False, dtype=whole.dtype, device=whole.device)
        with torch.no_grad():
            own.weight.copy_(torch.linalg.solve(phi, torch.linalg.solve(omega, whole, left=False)))
        if module.bias is not None:
            modules[f"{name}_homogeneous"] = Homogeneous()
        modules[f"{name}_omega"], modules[name], modules[f"{name}_phi"] = Coordinates(omega), own, Coordinates(phi)
    return nn.Sequential(modules).train(model.training)


def restored(twin: nn.Sequential, model: nn.Sequential) -> nn.Sequential:
    """A transformed network in the original coordinates again: ζ of theorem 1, W̄ = Φ W† Ω.

    Args:
        twin: what `transformed` returned, trained since or not.
        model: what it was called with; it stays as it is.

    Returns:
        A copy of the model with the weights that make it the twin's function.
    """
    found = copy.deepcopy(model)
    parts = dict(twin.named_children())
    with torch.no_grad():
        for name, layer in found.named_children():
            if isinstance(layer, nn.Linear):
                omega, phi = parts[f"{name}_omega"], parts[f"{name}_phi"]
                assert isinstance(omega, Coordinates)
                assert isinstance(phi, Coordinates)
                _set(layer, phi.matrix @ parts[name].weight @ omega.matrix)  # type: ignore[operator]
    return found


def whitening(
    factors: Sequence[tuple[Tensor, Tensor]], *, homogeneous: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """Ω and Φ that centre and whiten a network's activities and unit-gradients (Martens & Grosse 2015, corollary 3).

    Gradient descent in the network so transformed takes the steps of block-diagonal K-FAC without damping in the
    original one.

    Args:
        factors: A and G of each linear layer, positive definite: `.A` and `.G` of the `.operators` of "kfac".
        homogeneous: whether the last coordinate of A is the constant 1, as for layers with biases, which then stays.

    Returns:
        Ω with Ω A Ωᵀ = I, and Φ with Φᵀ G Φ = I, of each layer.
    """
    return [_whitener(A, homogeneous) for A, _ in factors], [_root(G).mT.contiguous() for _, G in factors]


def logistic_twin(model: nn.Sequential) -> nn.Sequential:
    """The same function with logistic units in the place of tanh: σ(u) = (tanh(u/2) + 1)/2 (after corollary 2).

    Args:
        model: linear layers with biases, each followed by a tanh or by nothing; it stays as it is.

    Returns:
        The network of the same make with `nn.Sigmoid`.
    """
    children = list(model.named_children())
    modules = OrderedDict((name, nn.Sigmoid() if isinstance(m, nn.Tanh) else copy.deepcopy(m)) for name, m in children)
    tanh = [False, *(isinstance(module, nn.Tanh) for _, module in children), False]
    with torch.no_grad():
        for place, layer in enumerate(modules.values(), 1):
            if not isinstance(layer, nn.Linear):
                continue
            whole = homogeneous_weight(layer)
            if tanh[place - 1]:  # its inputs are a† = (a + 1)/2
                whole[:, -1] -= whole[:, :-1].sum(1)
                whole[:, :-1] *= 2
            if tanh[place + 1]:  # its outputs are s† = 2 s
                whole *= 2
            _set(layer, whole)
    return nn.Sequential(modules).train(model.training)


def homogeneous_weight(layer: nn.Linear) -> Tensor:
    """W̄ = [W b], a new tensor (d_out, d_in + 1), or W where there is no bias."""
    weight = layer.weight.detach()
    return weight.clone() if layer.bias is None else torch.cat([weight, layer.bias.detach()[:, None]], 1)


def _set(layer: nn.Linear, whole: Tensor) -> None:
    layer.weight.copy_(whole[:, : layer.in_features])
    if layer.bias is not None:
        layer.bias.copy_(whole[:, -1])


def _linear(model: nn.Sequential) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, module) for name, module in model.named_children() if isinstance(module, nn.Linear))


def _root(matrix: Tensor) -> Tensor:
    """R with R M Rᵀ = I."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(cholesky(matrix, "a factor that is to be whitened"), eye, upper=False)


def _whitener(A: Tensor, homogeneous: bool) -> Tensor:
    if not homogeneous:
        return _root(A)
    mean = A[:-1, -1:]
    root = _root(A[:-1, :-1] - mean @ mean.mT)
    last = torch.zeros_like(A[-1:])
    last[0, -1] = 1
    return torch.cat([torch.cat([root, -root @ mean], 1), last])
