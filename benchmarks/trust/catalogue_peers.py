"""Rows of the catalogue that public libraries get wrong: their diagonal of the Fisher beside brute-force autograd's."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

import fisherviz as fv
from tests.oracles import exact, laws

CLASSES = 2


def _called_twice() -> nn.Module:
    shared = nn.Linear(3, 3)
    return nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(3, CLASSES))


def _tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, CLASSES))
    net[2].weight = net[0].weight
    return net


def _circular() -> nn.Module:
    conv = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(2 * 4 * 3, CLASSES))


def _grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 3 * 2, CLASSES))


def _hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    net[0].register_forward_hook(lambda module, args, out: 2 * out)
    return net


def _plain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES))


class _Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(3, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.head(h - h.mean(0))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "two linear layers (nothing to go wrong)": (_plain, (6, 3)),
    "a module that is called twice": (_called_twice, (6, 3)),
    "two modules with one weight": (_tied, (6, 3)),
    "a convolution with circular padding": (_circular, (6, 1, 4, 3)),
    "a convolution in two groups": (_grouped, (6, 2, 4, 3)),
    "a hook that doubles a layer's output": (_hooked, (6, 3)),
    "examples that are centred by their batch (no Fisher of single examples)": (_Centred, (6, 3)),
}


def _ours(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return fv.Probe(model, "categorical").fisher(x).diagonal()


def _curvlinops(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    import curvlinops

    parameters = [p for p in model.parameters() if p.requires_grad]
    operator = curvlinops.GGNLinearOperator(model, nn.CrossEntropyLoss(), parameters, [(x, y)])
    return torch.as_tensor(operator @ torch.eye(sum(p.numel() for p in parameters), dtype=x.dtype)).diagonal()


def _backpack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    import backpack
    from backpack.extensions import DiagGGNExact

    extended, loss = backpack.extend(model), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(DiagGGNExact()):
        loss(extended(x), y).backward()
    return torch.cat([p.diag_ggn_exact.reshape(-1) for p in extended.parameters()])


def _nngeometry(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDense
    from torch.utils.data import DataLoader, TensorDataset

    before = torch.get_default_dtype()
    torch.set_default_dtype(x.dtype)  # it makes tensors of its own in the default type
    try:
        found = FIM(model, DataLoader(TensorDataset(x, y), batch_size=len(x)), PMatDense)
        return found.to_torch().diagonal()
    finally:
        torch.set_default_dtype(before)


LIBRARIES: dict[str, tuple[str, str, Callable[[nn.Module, Tensor, Tensor], Tensor]]] = {
    "fisherviz": ("fisherviz", "", _ours),
    "curvlinops": ("curvlinops", "curvlinops-for-pytorch", _curvlinops),
    "BackPACK": ("backpack", "backpack-for-pytorch", _backpack),
    "NNGeometry": ("nngeometry", "nngeometry", _nngeometry),
}


def measured() -> list[dict[str, Any]]:
    """A row for each case, with what each installed library gives: a largest relative error, or its refusal."""
    found = []
    for name, (make, shape) in CASES.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            prototype = make().double().eval()
            x, y = torch.randn(shape, dtype=torch.float64), torch.randint(CLASSES, (shape[0],))
        truth = torch.as_tensor(exact.fisher(prototype, x, laws.Categorical())).diagonal()
        cells = {}
        for library, (module, distribution, diagonal) in LIBRARIES.items():
            if importlib.util.find_spec(module) is None:
                continue
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = make().double().eval()
            cells[library] = {"version": version(distribution) if distribution else fv.__version__}
            cells[library] |= _one(diagonal, model, x, y, truth)
        found.append({"case": name, "libraries": cells})
    return found


def _one(
    diagonal: Callable[[nn.Module, Tensor, Tensor], Tensor], model: nn.Module, x: Tensor, y: Tensor, truth: Tensor
) -> dict[str, Any]:
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            got = diagonal(model, x, y).detach()
    except Exception as error:  # whatever a library of somebody else's raises is its refusal
        return {"said": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"}
    if got.shape != truth.shape:
        return {"said": f"gives {len(got)} numbers for {len(truth)} parameters"}
    return {"error": float((got - truth).abs().max() / truth.abs().max())}


if __name__ == "__main__":
    for row in measured():
        print(row["case"])
        for library, cell in row["libraries"].items():
            print(f"    {library} {cell['version']}: {cell.get('error', cell.get('said'))}")
