"""Networks that people train: a CIFAR ResNet-20 and a block of GPT-2, their batches and what fisherviz is asked.

Inputs and weights are random: what a pass costs does not depend on what the inputs show.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

import fisherviz as fv
from benchmarks.workloads import Case, Workload

IMAGES, SEQUENCES = 64, 16
WIDTH, LENGTH, VOCABULARY = 256, 64, 2000


class Residual(nn.Module):
    """Two convolutions with BatchNorm; a strided one has a convolution in its shortcut."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        stride = 1 if d_in == d_out else 2
        self.conv1 = nn.Conv2d(d_in, d_out, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(d_out, d_out, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.relu1, self.relu2 = nn.BatchNorm2d(d_out), nn.BatchNorm2d(d_out), nn.ReLU(), nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(d_in, d_out, 1, stride, bias=False), nn.BatchNorm2d(d_out))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W)."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


def resnet20() -> nn.Sequential:
    """He et al. 2016's network for CIFAR-10, 272,474 parameters."""
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [Residual(d_in, d_out) for d_in, d_out in pairwise(widths)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


class Attention(nn.Module):
    """Causal attention with one fused projection, as in GPT-2."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.attend, self.out = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences (N, T, d)."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.attend(x).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """A block of GPT-2 between embeddings and an output layer of its own, 1.8 million parameters."""

    def __init__(self, d: int = WIDTH, heads: int = 4) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, d), nn.Embedding(LENGTH, d)
        self.ln1, self.ln2, self.ln = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = Attention(d, heads)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        self.head = nn.Linear(d, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T) to logits (N, T, V)."""
        h = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]).expand_as(tokens))
        h = h + self.attention(self.ln1(h))
        return self.head(self.ln(h + self.mlp(self.ln2(h))))


def images(examples: int = IMAGES) -> Case:
    """ResNet-20 on a batch of images."""
    torch.manual_seed(0)
    return Case(resnet20(), torch.randn(examples, 3, 32, 32), torch.randint(10, (examples,)))


def texts(examples: int = SEQUENCES) -> Case:
    """The block of GPT-2 on a batch of sequences."""
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (examples, LENGTH + 1))
    return Case(GPT(), tokens[:, :-1], tokens[:, 1:])


def filters(make: Callable[[], Case]) -> Callable[[], Case]:
    """The same with its convolutions and Linear layers alone, which have Kronecker factors."""

    def made() -> Case:
        case = make()
        names = [name for name, m in case.model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        return Case(case.model, case.x, case.y, tuple(names))

    return made


def diagonal_product(case: Case, diagonal: Tensor) -> Tensor:
    """Its product with v."""
    return diagonal * case.v


WORKLOADS = {
    w.name: w
    for w in [
        Workload("ResNet diagonal", f"exact diagonal of a ResNet-20 (272,000 parameters), N = {IMAGES}", None, "x",
                 images, lambda c: c.probe.fisher(c.x).diagonal(), diagonal_product, examples=4, rounds=3),
        Workload("ResNet K-FAC", "Kronecker factors of its convolutions and Linear layer, exact kind", None, "x",
                 filters(images), lambda c: fv.approximate(c.probe.fisher(c.x), "kfac"), lambda c, r: r @ c.v,
                 examples=4, rounds=3),
        Workload("GPT diagonal", f"diagonal of a GPT-2 block of width {WIDTH}, T = {LENGTH}, vocabulary {VOCABULARY}, "
                 f"one sampled label per position, N = {SEQUENCES}", None, "x",
                 texts, lambda c: c.probe.fisher(c.x, kind="mc").diagonal(), diagonal_product, examples=None,
                 rounds=5),
        Workload("GPT K-FAC", "Kronecker factors of its Linear layers, one sampled label per position", None, "x",
                 filters(texts), lambda c: fv.approximate(c.probe.fisher(c.x, kind="mc"), "kfac"), lambda c, r: r @ c.v,
                 examples=None, rounds=5),
    ]
}  # fmt: skip
