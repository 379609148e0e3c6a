"""The public peers: how each computes a workload, and how its result becomes a product with v in our order and scale.

A peer enters the table only after its result equals ours (`check`). Known differences of scale and of blocks stand
beside the function that undoes them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import fisherviz as fv
from benchmarks.workloads import DAMPING, Case, dense_product, itself, units_product


@dataclass(frozen=True)
class Peer:
    """One way to compute a workload.

    Attributes:
        package: module that must be installed.
        run: computes; this is timed.
        product: the result's product with v.
        reference: what ours gives for the same quantity; None: the workload's own result.
        tolerance: relative error allowed between the two.
        note: how its work differs from ours.
    """

    package: str
    run: Callable[[Case], Any]
    product: Callable[[Case, Any], Tensor]
    reference: Callable[[Case], Tensor] | None = None
    tolerance: float = 2e-3
    note: str = ""

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return find_spec(self.package) is not None


def kronecker_product(case: Case, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(A ⊗ G) v for factors (A, G) by layer."""
    return case.flat([G @ V @ A for (A, G), V in zip(factors, case.matrices(), strict=True)])


# ---- nngeometry: means over examples; weight before bias ------------------------------------------------------------


def _collection(case: Case) -> Any:
    from nngeometry.layercollection import LayerCollection

    layers = LayerCollection()
    for module in case.modules:
        layers.add_layer_from_model(case.model, module)
    return layers


def _loader(case: Case) -> Any:
    dataset = torch.utils.data.TensorDataset(case.x, case.y)
    return torch.utils.data.DataLoader(dataset, batch_size=len(case.x))


def _nngeometry(representation: str, sampled: bool = False) -> Callable[[Case], Any]:
    def run(case: Case) -> Any:
        import nngeometry.metrics
        import nngeometry.object

        metric = nngeometry.metrics.FIM_MonteCarlo if sampled else nngeometry.metrics.FIM
        kind = getattr(nngeometry.object, representation)
        return metric(case.model, _loader(case), kind, layer_collection=_collection(case))

    return run


def _nngeometry_kronecker(case: Case, result: Any) -> Tensor:
    return kronecker_product(case, [result.data[name] for name in case.probe.space.names])


def _nngeometry_vector(case: Case) -> Tensor:
    from nngeometry.object import PVector

    fisher = _nngeometry("PMatImplicit")(case)
    parts, layers = {}, fisher.generator.layer_collection
    for name, V in zip(case.probe.space.names, case.matrices(), strict=True):
        parts[name] = (V[:, :-1].contiguous(), V[:, -1].contiguous())
    return fisher.mv(PVector(layers, dict_repr=parts)).to_torch()


# ---- ASDL: constants spread over the factors; its products are Fisher means -----------------------------------------


def _asdl(kind: str, shape: str) -> Callable[[Case], Any]:
    def run(case: Case) -> Any:
        import asdl

        ignored = [m for m in case.model.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m not in case.modules]
        config = asdl.FisherConfig(
            kind, [shape], loss_type="cross_entropy", data_size=len(case.x), ignore_modules=ignored
        )
        maker = asdl.get_fisher_maker(case.model, config)
        dummy = maker.setup_model_call(case.model, case.x)
        maker.setup_loss_call(nn.functional.cross_entropy, dummy, case.y)
        maker.forward_and_backward()
        return maker

    return run


def _asdl_full(case: Case, result: Any) -> Tensor:
    return dense_product(case, case.model.fisher.data)


def _asdl_block(case: Case, result: Any) -> Tensor:
    return dense_product(case, case.modules[0].fisher.data)


def _asdl_kronecker(case: Case, result: Any) -> Tensor:
    """Its A has no bias coordinate: the entries of the weights alone."""
    pad = nn.functional.pad
    return kronecker_product(case, [(pad(m.fisher.kron.A, (0, 1, 0, 1)), m.fisher.kron.B) for m in case.modules])


def _asdl_units(case: Case, result: Any) -> Tensor:
    return units_product(case, case.modules[0].fisher.unit.data)


def _asdl_natural(case: Case) -> Tensor:
    """Empirical: its own labels' gradients are the columns, so that no second vector is backpropagated."""
    import asdl

    case.model.zero_grad()
    maker = asdl.SmwEmpNaturalGradientMaker(case.model, asdl.SmwEmpNaturalGradientConfig(len(case.x), DAMPING))
    dummy = maker.setup_model_call(case.model, case.x)
    maker.setup_loss_call(nn.functional.cross_entropy, dummy, case.y)
    maker.forward_and_backward()
    return torch.cat([p.grad.reshape(-1) for p in case.parameters])


def _empirical_natural(case: Case) -> Tensor:
    return case.probe.fisher(case.x, case.y, kind="empirical").natural_gradient(DAMPING)


# ---- curvlinops: the generalised Gauss-Newton matrix of the mean loss, which is the Fisher ---------------------------


def _curvlinops_ggn(case: Case) -> Any:
    import curvlinops

    return curvlinops.GGNLinearOperator(
        case.model, nn.CrossEntropyLoss(), case.parameters, case.batches,
        check_deterministic=False, num_data=len(case.x),
    )  # fmt: skip


def _curvlinops_dense(case: Case) -> Tensor:
    return _curvlinops_ggn(case) @ torch.eye(case.probe.space.size)


def _curvlinops_vector(case: Case) -> Tensor:
    return _curvlinops_ggn(case) @ case.v


def _curvlinops_kfac(kind: str) -> Callable[[Case], Any]:
    def run(case: Case) -> Any:
        import curvlinops

        operator = curvlinops.KFACLinearOperator(
            case.model, nn.CrossEntropyLoss(), case.parameters, case.batches, check_deterministic=False,
            fisher_type=kind, separate_weight_and_bias=False, num_data=len(case.x), num_per_example_loss_terms=1,
        )  # fmt: skip
        operator.compute_kronecker_factors()
        return operator

    return run


def _curvlinops_product(case: Case, result: Any) -> Tensor:
    return result @ case.v


# ---- BackPACK: mean loss; weight and bias apart ----------------------------------------------------------------------


def _backpack(extension: str, **options: Any) -> Callable[[Case], Any]:
    def run(case: Case) -> None:
        import backpack
        from backpack import extensions

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = backpack.extend(case.model)
            loss = backpack.extend(nn.CrossEntropyLoss())
            case.model.zero_grad()
            with backpack.backpack(getattr(extensions, extension)(**options)):
                loss(model(case.x), case.y).backward()

    return run


def _backpack_dense(case: Case) -> Tensor:
    _backpack("SqrtGGNExact")(case)
    roots = torch.cat([p.sqrt_ggn_exact.flatten(0, 1).flatten(1) for p in case.parameters], 1)
    return roots.T @ roots


def _backpack_kronecker(saved: str) -> Callable[[Case, Any], Tensor]:
    def product(case: Case, result: Any) -> Tensor:
        parts = []
        for module, V in zip(case.modules, case.matrices(), strict=True):
            G, A = getattr(module.weight, saved)
            parts.append(torch.cat([G @ V[:, :-1] @ A, getattr(module.bias, saved)[0] @ V[:, -1:]], 1))
        return case.flat(parts)

    return product


def _exact_kfac(case: Case) -> Tensor:
    """All of K-FAC."""
    return fv.approximate(case.probe.fisher(case.x), "kfac") @ case.v


def _without(bias: bool) -> Callable[[Case], Tensor]:
    """K-FAC without the entries between weights and biases; with `bias` also without those of the biases."""

    def reference(case: Case) -> Tensor:
        approximation = fv.approximate(case.probe.fisher(case.x), "kfac")
        factors = []
        for operator in approximation.matrix.operators:
            A = operator.A.clone()
            A[-1, :-1] = A[:-1, -1] = 0
            A[-1, -1] *= not bias
            factors.append((A, operator.G))
        return kronecker_product(case, factors)

    return reference


def _backpack_vector(case: Case) -> Tensor:
    from backpack.hessianfree.ggnvp import ggn_vector_product_from_plist

    z = case.model(case.x)
    loss = nn.functional.cross_entropy(z, case.y)
    pieces = case.v.split([p.numel() for p in case.parameters])
    split = [v.reshape(p.shape) for p, v in zip(case.parameters, pieces, strict=True)]
    found = ggn_vector_product_from_plist(loss, z, case.parameters, split)
    return torch.cat([part.reshape(-1) for part in found])


_NOISE = 0.3
"""One label per example, drawn otherwise than ours: compared with the exact factors, where half or twice would show."""

_APART, _WEIGHTS = "weights and biases apart", "weights alone"

PEERS: dict[str, dict[str, Peer]] = {
    "W1": {
        "nngeometry": Peer("nngeometry", _nngeometry("PMatDense"), lambda c, r: r.to_torch() @ c.v),
        "ASDL": Peer("asdl", _asdl("fisher_exact", "full"), _asdl_full),
        "BackPACK": Peer("backpack", _backpack_dense, dense_product),
        "curvlinops": Peer("curvlinops", _curvlinops_dense, dense_product),
    },
    "W2": {
        "nngeometry": Peer("nngeometry", _nngeometry("PMatDense"), lambda c, r: r.to_torch() @ c.v),
        "ASDL": Peer("asdl", _asdl("fisher_exact", "layer_wise"), _asdl_block),
        "BackPACK": Peer("backpack", _backpack_dense, dense_product),
    },
    "W3": {
        "nngeometry": Peer("nngeometry", _nngeometry("PMatKFAC"), _nngeometry_kronecker),
        "ASDL": Peer("asdl", _asdl("fisher_exact", "kron"), _asdl_kronecker, _without(True), note=_WEIGHTS),
        "BackPACK": Peer("backpack", _backpack("KFLR"), _backpack_kronecker("kflr"), _without(False), note=_APART),
        "curvlinops": Peer("curvlinops", _curvlinops_kfac("type-2"), _curvlinops_product),
    },
    "W3m": {
        "nngeometry": Peer("nngeometry", _nngeometry("PMatKFAC", True), _nngeometry_kronecker, _exact_kfac, _NOISE),
        "ASDL": Peer("asdl", _asdl("fisher_mc", "kron"), _asdl_kronecker, _without(True), _NOISE, _WEIGHTS),
        "BackPACK": Peer(
            "backpack", _backpack("KFAC", mc_samples=1), _backpack_kronecker("kfac"), _without(False), _NOISE, _APART
        ),
        "curvlinops": Peer("curvlinops", _curvlinops_kfac("mc"), _curvlinops_product, _exact_kfac, _NOISE),
    },
    "W5": {"ASDL": Peer("asdl", _asdl("fisher_exact", "unit_wise"), _asdl_units)},
    "W6": {
        "curvlinops": Peer("curvlinops", _curvlinops_vector, itself),
        "BackPACK": Peer("backpack", _backpack_vector, itself),
        "nngeometry": Peer("nngeometry", _nngeometry_vector, itself),
    },
    "W7": {"ASDL": Peer("asdl", _asdl_natural, itself, _empirical_natural, note="empirical kind: one vector less")},
}  # fmt: skip
PEERS["W2c"] = PEERS["W2"]
PEERS["W6 kept"] = PEERS["W6"]
PEERS["W7 N=100"] = PEERS["W7"]
PEERS["W5 inverses"] = {}


def check(case: Case, peer: Peer, product: Tensor) -> float:
    """Relative error between a peer's product with v and ours.

    Raises:
        ValueError: it exceeds the tolerance, so that the peer computes something else.
    """
    theirs = peer.product(case, peer.run(case)).detach()
    ours = product if peer.reference is None else peer.reference(case)
    error = float((theirs - ours).norm() / ours.norm())
    if not error <= peer.tolerance:
        raise ValueError(f"its product differs from ours by {error:.3g}, more than {peer.tolerance:.3g}")
    return error
