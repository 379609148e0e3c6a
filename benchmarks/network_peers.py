"""The public peers on the networks of `networks`: what each can do of them, in our order and scale.

A peer that leaves out kinds of layers is compared, and timed, on the others; its note says so. Sampled labels differ,
so that where the GPT block's are drawn by us, a peer gets the data's and is compared with our empirical kind on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fisherviz as fv
from benchmarks.peers import Peer
from benchmarks.workloads import Case

FILTERS = (nn.Conv2d, nn.Linear)
GIVEN = "labels given, not drawn"


def filters(case: Case, weights_alone: bool = False) -> dict[str, nn.Parameter]:
    """Parameters of convolutions and Linear layers, by name."""
    found = {}
    for name, module in case.model.named_modules():
        if isinstance(module, FILTERS):
            found |= {f"{name}.{key}": p for key, p in module._parameters.items() if p is not None}
    return {name: p for name, p in found.items() if not weights_alone or name.endswith("weight")}


def restricted(case: Case, names: Sequence[str], product: Callable[[Tensor], Tensor]) -> Tensor:
    """The part of a product on some parameters, of the part of v on them."""
    mask = torch.cat([torch.full((p.numel(),), name in set(names)) for name, p in case.probe.parameters().items()])
    return product(case.v * mask) * mask


def scattered(case: Case, parts: dict[str, Tensor]) -> Tensor:
    """Parts by parameter's name, flat in our order; nothing elsewhere."""
    own = case.probe.parameters()
    return torch.cat([parts.get(name, torch.zeros_like(p)).reshape(-1) for name, p in own.items()])


def pieces(case: Case) -> dict[str, Tensor]:
    """The vector v by parameter's name."""
    own = case.probe.parameters()
    return {
        name: v.view_as(p)
        for (name, p), v in zip(own.items(), case.v.split([p.numel() for p in own.values()]), strict=True)
    }


# ---- what ours gives ---------------------------------------------------------------------------------------------


def _fisher(case: Case) -> Any:
    exact = case.x.is_floating_point()
    return case.probe.fisher(case.x) if exact else case.probe.fisher(case.x, case.y, kind="empirical")


def _diagonal(case: Case, names: Sequence[str]) -> Tensor:
    diagonal = _fisher(case).diagonal()
    return restricted(case, names, lambda v: diagonal * v)


def _whole_diagonal(case: Case) -> Tensor:
    return _diagonal(case, list(case.probe.parameters()))


def _filters_diagonal(case: Case) -> Tensor:
    return _diagonal(case, list(filters(case)))


def _kfac(weights_alone: bool = False) -> Callable[[Case], Tensor]:
    def reference(case: Case) -> Tensor:
        approximation = fv.approximate(_fisher(case), "kfac")
        return restricted(case, list(filters(case, weights_alone)), lambda v: approximation @ v)

    return reference


# ---- peers ---------------------------------------------------------------------------------------------------------


def _saved_diagonal(saved: Callable[[Any, str], Tensor]) -> Callable[[Case, Any], Tensor]:
    """The product of a diagonal that a peer leaves at each module's parameter, where it leaves one."""

    def product(case: Case, result: Any) -> Tensor:
        parts, v = {}, pieces(case)
        for name in v:
            path, _, key = name.rpartition(".")
            try:
                parts[name] = saved(case.model.get_submodule(path), key).view_as(v[name]) * v[name]
            except AttributeError:
                continue
        return scattered(case, parts)

    return product


def _backpack_diagonal(case: Case) -> None:
    import backpack
    from backpack import extensions

    model = backpack.extend(case.model, use_converter=True)
    loss = backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(extensions.DiagGGNExact()):
        loss(model(case.x), case.y).backward()


def _backpack_factors(case: Case) -> None:
    import backpack
    from backpack import extensions

    model = backpack.extend(case.model, use_converter=True)
    loss = backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(extensions.KFLR()):
        loss(model(case.x), case.y).backward()


def _asdl(kind: str, shape: str, ignored: tuple[type[nn.Module], ...]) -> Callable[[Case], Any]:
    def run(case: Case) -> Any:
        import asdl

        modules = [m for m in case.model.modules() if isinstance(m, ignored)]
        config = asdl.FisherConfig(kind, [shape], loss_type="cross_entropy", data_size=len(case.x),
                                   ignore_modules=modules)  # fmt: skip
        maker = asdl.get_fisher_maker(case.model, config)
        dummy = maker.setup_model_call(case.model, case.x)
        if case.x.is_floating_point():
            maker.setup_loss_call(functional.cross_entropy, dummy, case.y)
        else:
            maker.setup_loss_call(_of_tokens, dummy, case.y)
        maker.forward_and_backward()
        return maker

    return run


def _of_tokens(z: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return functional.cross_entropy(z.flatten(0, -2), y.flatten(), reduction=reduction)


def _asdl_factors(case: Case, result: Any) -> Tensor:
    """Of sums over tokens, which both of its factors have: T times ours."""
    parts, v = {}, pieces(case)
    terms = 1 if case.x.is_floating_point() else case.x.shape[1]
    for name in filters(case, weights_alone=True):
        kron = case.model.get_submodule(name.rpartition(".")[0]).fisher.kron
        parts[name] = (kron.B @ v[name].flatten(1) @ kron.A).view_as(v[name]) / terms
    return scattered(case, parts)


def _nngeometry(representation: str) -> Callable[[Case], Any]:
    def run(case: Case) -> Any:
        from nngeometry.layercollection import LayerCollection
        from nngeometry.metrics import FIM
        from nngeometry.object import pspace

        kind = getattr(pspace, representation)
        layers = LayerCollection()
        for module in case.model.modules():
            if isinstance(module, FILTERS) or (representation == "PMatDiag" and isinstance(module, nn.BatchNorm2d)):
                layers.add_layer_from_model(case.model, module)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(case.x, case.y), batch_size=len(case.x))
        return FIM(case.model, loader, kind, layer_collection=layers)

    return run


def _nngeometry_diagonal(case: Case, result: Any) -> Tensor:
    return result.get_diag() * case.v


def _nngeometry_factors(case: Case, result: Any) -> Tensor:
    parts, v = {}, pieces(case)
    names = dict.fromkeys(name.rpartition(".")[0] for name in filters(case))
    for name, (a, g) in zip(names, result.data.values(), strict=True):
        matrix = v[f"{name}.weight"].flatten(1)
        if f"{name}.bias" in v:
            matrix = torch.cat([matrix, v[f"{name}.bias"].unsqueeze(1)], 1)
        found = g @ matrix @ a
        parts[f"{name}.weight"] = found[:, : v[f"{name}.weight"][0].numel()]
        if f"{name}.bias" in v:
            parts[f"{name}.bias"] = found[:, -1]
    return scattered(case, parts)


class _ClassesSecond(nn.Module):
    """A model whose logits have their classes second, as CrossEntropyLoss reads them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, C) or (N, C, T)."""
        z = self.model(x)
        return z.movedim(-1, 1) if z.dim() > 2 else z


def _curvlinops(kind: str) -> Callable[[Case], Any]:
    def run(case: Case) -> Any:
        import curvlinops

        terms = 1 if case.x.is_floating_point() else case.x.shape[1]
        operator = curvlinops.KFACLinearOperator(
            _ClassesSecond(case.model), nn.CrossEntropyLoss(reduction="mean"), list(filters(case).values()),
            case.batches, check_deterministic=False, fisher_type=kind, separate_weight_and_bias=False,
            num_data=len(case.x), num_per_example_loss_terms=terms,
        )  # fmt: skip
        operator.compute_kronecker_factors()
        return operator

    return run


def _curvlinops_product(case: Case, result: Any) -> Tensor:
    """Of the mean over tokens: T times ours of their sum."""
    v, names = pieces(case), list(filters(case))
    terms = 1 if case.x.is_floating_point() else case.x.shape[1]
    found = result @ [v[name] for name in names]
    return scattered(case, {name: terms * part for name, part in zip(names, found, strict=True)})


def _opacus(case: Case) -> dict[str, Tensor]:
    """Squares of its per-example gradients: of one vector for given labels, of C for the exact Fisher of C classes."""
    from opacus.grad_sample import GradSampleModule

    for module in case.model.modules():
        if isinstance(module, nn.BatchNorm2d):  # which it refuses to train
            module.requires_grad_(False)
        else:
            module.training = True  # where alone it notes the inputs
    hooked = GradSampleModule(case.model, loss_reduction="sum", strict=False)
    names = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in names.items()}
    exact = case.x.is_floating_point()
    for c in range(10 if exact else 1):
        z = hooked(case.x)  # its hooks forget the inputs after a backward pass
        if exact:
            p = z.detach().softmax(1)
            v = -p * p[:, c : c + 1].sqrt()
            v[:, c] += p[:, c].sqrt()
            z.backward(v)
        else:
            functional.cross_entropy(z.flatten(0, -2), case.y.flatten(), reduction="sum").backward()
        for name, p in names.items():
            total[name] += p.grad_sample.square().sum(0) / len(case.x)
            p.grad_sample = None
    hooked.remove_hooks()
    case.model.eval().requires_grad_(True)
    return total


def _opacus_product(case: Case, result: dict[str, Tensor]) -> Tensor:
    v = pieces(case)
    return scattered(case, {name: part * v[name] for name, part in result.items()})


PEERS: dict[str, dict[str, Peer]] = {
    "ResNet diagonal": {
        "BackPACK": Peer("backpack", _backpack_diagonal, _saved_diagonal(lambda m, k: getattr(m, k).diag_ggn_exact),
                         _whole_diagonal),
        "nngeometry": Peer("nngeometry", _nngeometry("PMatDiag"), _nngeometry_diagonal, _whole_diagonal),
        "ASDL": Peer("asdl", _asdl("fisher_exact", "diag", ()),
                     _saved_diagonal(lambda m, k: getattr(m.fisher.diag, k)), _whole_diagonal),
        "Opacus": Peer("opacus", _opacus, _opacus_product, _filters_diagonal, note="without BatchNorm"),
    },
    "ResNet K-FAC": {
        "BackPACK": Peer("backpack", _backpack_factors, _asdl_factors, _kfac()),
        "nngeometry": Peer("nngeometry", _nngeometry("PMatKFAC"), _nngeometry_factors, _kfac()),
        "ASDL": Peer("asdl", _asdl("fisher_exact", "kron", (nn.BatchNorm2d,)), _asdl_factors, _kfac(True),
                     note="weights alone"),
        "curvlinops": Peer("curvlinops", _curvlinops("type-2"), _curvlinops_product, _kfac()),
    },
    "GPT diagonal": {
        "BackPACK": Peer("backpack", _backpack_diagonal, _saved_diagonal(lambda m, k: getattr(m, k).diag_ggn_exact),
                         _whole_diagonal),
        "nngeometry": Peer("nngeometry", _nngeometry("PMatDiag"), _nngeometry_diagonal, _whole_diagonal),
        "ASDL": Peer("asdl", _asdl("fisher_emp", "diag", ()), _saved_diagonal(lambda m, k: getattr(m.fisher.diag, k)),
                     _whole_diagonal),
        "Opacus": Peer("opacus", _opacus, _opacus_product, _whole_diagonal, note=GIVEN),
    },
    "GPT K-FAC": {
        "BackPACK": Peer("backpack", _backpack_factors, _asdl_factors, _kfac()),
        "nngeometry": Peer("nngeometry", _nngeometry("PMatKFAC"), _nngeometry_factors, _kfac()),
        "ASDL": Peer("asdl", _asdl("fisher_emp", "kron", (nn.Embedding, nn.LayerNorm)), _asdl_factors, _kfac(True),
                     note=f"weights alone, {GIVEN}"),
        "curvlinops": Peer("curvlinops", _curvlinops("empirical"), _curvlinops_product, _kfac(),
                           note=GIVEN),
    },
}  # fmt: skip
