"""The manual's tables that are measured or read from the code: `python docs/tables.py` writes them anew.

A table stands between two comments of a page, `<!-- table: NAME -->` and `<!-- end -->`; a test holds that each is what
its function here returns.
"""

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import fisherviz as fv
from fisherviz.operators import Dense, Diagonal, DiagonalKronecker, DirectSum, Kronecker, KroneckerEigen, UnitBlocks
from fisherviz.optim.options import keywords
from fisherviz.results.metrics import METRICS
from fisherviz.support.files import write_whole

HERE = Path(__file__).parent
EXACT = 1e-10
"""Of the Frobenius norm: what float64 rounding stays well below."""


class Own(nn.Module):
    """A module with parameters of its own and no structure that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Cubes."""
        return self.scale * x**3


class Pooled(nn.Module):
    """The mean over all positions of what a module gives; the last axis, or the second, holds the features."""

    def __init__(self, module: nn.Module, features_second: bool = False) -> None:
        super().__init__()
        self.module, self.features_second = module, features_second

    def forward(self, x: Tensor) -> Tensor:
        """The means (N, features)."""
        y = self.module(x)
        y = y[0] if isinstance(y, tuple) else y
        y = y.tanh()  # the mean of what is normalised is constant
        if y.dim() > 2:
            y = y.flatten(2).mean(2) if self.features_second else y.flatten(1, -2).mean(1)
        return y


class SelfAttention(nn.Module):
    """Attention of tokens to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """The attended tokens."""
        return self.attention(x, x, x, need_weights=False)[0]


class TiedHead(nn.Module):
    """A table that embeds tokens and scores them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        """The scores of the mean token."""
        return self.head(self.table(x).mean(1).tanh())


def _case(module: nn.Module, *shape: int, second: bool = False) -> tuple[nn.Module, Tensor]:
    return Pooled(module, second), torch.randn(4, *shape)


def _tokens(module: nn.Module) -> tuple[nn.Module, Tensor]:
    return module if isinstance(module, TiedHead) else Pooled(module), torch.randint(5, (4, 6))


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "Linear": lambda: _case(nn.Linear(3, 4), 3),
    "Linear on tokens": lambda: _case(nn.Linear(3, 4), 5, 3),
    "Conv1d": lambda: _case(nn.Conv1d(2, 3, 3, stride=2, padding=1), 2, 7, second=True),
    "Conv2d": lambda: _case(nn.Conv2d(2, 3, 3, padding="same", dilation=2), 2, 5, 5, second=True),
    "Conv2d in groups": lambda: _case(nn.Conv2d(4, 6, 2, groups=2), 4, 4, 4, second=True),
    "Conv2d, depthwise": lambda: _case(nn.Conv2d(3, 3, 2, groups=3), 3, 4, 4, second=True),
    "Conv3d": lambda: _case(nn.Conv3d(1, 2, 2), 1, 3, 3, 3, second=True),
    "ConvTranspose2d": lambda: _case(nn.ConvTranspose2d(2, 3, 2, stride=2), 2, 3, 3, second=True),
    "Embedding": lambda: _tokens(nn.Embedding(5, 3, padding_idx=0)),
    "Embedding whose table is the head": lambda: _tokens(TiedHead()),
    "LayerNorm": lambda: _case(nn.LayerNorm(3), 3),
    "RMSNorm": lambda: _case(nn.RMSNorm(3), 3),
    "GroupNorm": lambda: _case(nn.GroupNorm(2, 4), 4, 3, 3, second=True),
    "InstanceNorm2d(affine=True)": lambda: _case(nn.InstanceNorm2d(2, affine=True), 2, 3, 3, second=True),
    "BatchNorm2d in evaluation": lambda: _case(nn.BatchNorm2d(3), 3, 3, 3, second=True),
    "PReLU": lambda: _case(nn.PReLU(3), 3),
    "MultiheadAttention, self-attention": lambda: _case(SelfAttention(), 3, 4),
    "TransformerEncoderLayer": lambda: _case(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 3, 4),
    "RNN": lambda: _case(nn.RNN(2, 3, batch_first=True), 4, 2),
    "GRU": lambda: _case(nn.GRU(2, 3, batch_first=True), 4, 2),
    "LSTM": lambda: _case(nn.LSTM(2, 3, batch_first=True), 4, 2),
    "weight_norm(Linear)": lambda: _case(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), 3),
    "a module of your own": lambda: _case(Own(), 3),
}
WORDS = {
    Kronecker: "A ⊗ G",
    DiagonalKronecker: "A ⊗ G, A diagonal",
    DirectSum: "A ⊗ G of each group",
    UnitBlocks: "exact block of each feature",
    Diagonal: "exact diagonal",
    Dense: "exact block",
    KroneckerEigen: "the sum over both uses, in a shared eigenbasis",
}


def brute_force(model: nn.Module, x: Tensor, parameters: list[str]) -> Tensor:
    """The mean over examples of Jᵀ (diag p − p pᵀ) J, the Jacobians J row by row from autograd."""
    named = dict(model.named_parameters())
    total: Tensor | float = 0.0
    for example in x:
        logits = model(example[None])[0]
        rows = []
        for z in logits:
            found = torch.autograd.grad(z, [named[n] for n in parameters], retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in found]))
        jacobian, p = torch.stack(rows), logits.softmax(0)
        total = total + jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian
    return total.detach() / len(x)


def layers() -> str:
    """What becomes of each kind of layer: path, K-FAC's block, and how far the Fisher is from brute force."""
    rows = ["| layer | path | `kfac` takes it by | exact Fisher is autograd's |", "|---|---|---|---|"]
    for name, build in CASES.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, x = build()
            model = model.double().eval()
            x = x.double() if x.is_floating_point() else x
        probe = fv.Probe(model, "categorical")
        fisher = probe.fisher(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the table says it
            kfac = fv.approximate(fisher, "kfac")
        exact = brute_force(model, x, list(probe.parameters()))
        away = float((fisher.to_dense() - exact).norm() / exact.norm())
        paths = ", ".join(dict.fromkeys(layer.path for layer in probe.layers))
        blocks = ", ".join(dict.fromkeys(WORDS.get(type(o), type(o).__name__) for o in kfac.operators))
        rows.append(f"| {name} | {paths} | {blocks} | {'yes' if away < EXACT else f'{away:.1e} away'} |")
    return "\n".join(rows)


OPTIMIZERS: dict[str, tuple[type[fv.optim.NaturalGradient], dict[str, object]]] = {
    "KFAC": (fv.optim.KFAC, {}),
    "KFAC, plain": (fv.optim.KFAC, {"rescale": False, "adapt": False}),
    "EKFAC": (fv.optim.EKFAC, {}),
    "FOOF": (fv.optim.FOOF, {}),
    "CWNGD": (fv.optim.CWNGD, {}),
    "TENGraD": (fv.optim.TENGraD, {}),
    "SubsampledNaturalGradient": (fv.optim.SubsampledNaturalGradient, {}),
    "KBFGS": (fv.optim.KBFGS, {"data": torch.zeros(1, 1)}),
    "HessianFree": (fv.optim.HessianFree, {}),
    "KSD": (fv.optim.KSD, {}),
    "NaturalGradient": (fv.optim.NaturalGradient, {"method": "kfac"}),
}


def optimizers() -> str:
    """The defaults of every optimizer, read from one that was made, and its paper's where they differ."""
    heads = ("lr", "damping", "momentum", "T", "decay", "kind")
    rows = ["| optimizer | " + " | ".join(f"`{head}`" for head in heads) + " | `.paper(...)` has |", "|---" * 8 + "|"]
    for name, (cls, options) in OPTIMIZERS.items():
        made = cls(nn.Linear(1, 2), "categorical", **options)
        found = {**made.param_groups[0], "T": made.T, "decay": made.decay, "kind": made.kind}
        given = keywords(cls)
        cells = [_value(found[head]) if head in given else "–" for head in heads]
        if made.param_groups[0]["momentum"] == 0 and "momentum" in given:
            cells[heads.index("momentum")] = "by the model"
        paper = ", ".join(f"{key} {_value(value)}" for key, value in cls.PAPER.items() if key != "kl_clip")
        rows.append(f"| `{name}` | " + " | ".join(cells) + f" | {paper} |")
    return "\n".join(rows)


def _value(value: object) -> str:
    return "∞" if value == math.inf else f"{value:g}" if isinstance(value, float) else str(value)


def metrics() -> str:
    """Every metric with its formula and its meaning, as the list of them has it."""
    rows = ["| metric | is | reads |", "|---|---|---|"]
    for name, entry in METRICS.items():
        formula = entry.formula.replace("|", "\\|").replace("*", "\\*")
        rows.append(f"| `{name}` | {formula} | {entry.meaning} |")
    return "\n".join(rows)


TABLES = {"layers": layers, "optimizers": optimizers, "metrics": metrics}
MARKED = re.compile(r"(<!-- table: (\w+) -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)


def renewed(text: str) -> str:
    """A page's text with its tables as they are now."""
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def main() -> None:
    """Write every page whose tables have changed."""
    for page in HERE.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        if (new := renewed(text)) != text:
            write_whole(page, new)
            print(f"{page.name} renewed")


if __name__ == "__main__":
    main()
