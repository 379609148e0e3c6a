"""Small versions of what people train, a few hundred parameters each, and real data for them: the embedded digits.

Images are the digits; for the others an image is a text, its pixels in reading order, of three shades: 4 x 4 or fewer
tokens, of which a model tells the next one, a hidden one, or whether the next is darker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fisherviz as fv
from fisherviz import datasets

SHADES, IGNORED = 3, -100


class Residual(nn.Module):
    """Two convolutions with BatchNorm, and a shortcut."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(d_in, d_out, 3, stride=2, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(d_out), nn.BatchNorm2d(d_out)
        self.conv2 = nn.Conv2d(d_out, d_out, 3, padding=1, bias=False)
        self.shortcut = nn.Sequential(nn.Conv2d(d_in, d_out, 1, stride=2, bias=False), nn.BatchNorm2d(d_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)), inplace=True)))
        y += self.shortcut(x)
        return functional.relu(y, inplace=True)


class ResNet(nn.Module):
    """A stem, a residual block, the mean over pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.block, self.fc = Residual(3, 4), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(functional.relu(self.bn(self.conv(x)), inplace=True)).mean((2, 3)))


class Inverted(nn.Module):
    """Expand, a depthwise convolution, squeeze and excite, project, and a residual connection."""

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(d, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()
        )
        self.squeeze, self.excite = nn.Conv2d(hidden, 2, 1), nn.Conv2d(2, hidden, 1)
        self.project = nn.Sequential(nn.Conv2d(hidden, d, 1, bias=False), nn.BatchNorm2d(d))

    def forward(self, x: Tensor) -> Tensor:
        h = self.depthwise(self.expand(x))
        gate = self.excite(functional.relu(self.squeeze(h.mean((2, 3), keepdim=True))))
        return x + self.project(h * functional.hardsigmoid(gate))


class MobileNet(nn.Module):
    """A strided stem and an inverted residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU6())
        self.block, self.fc = Inverted(4, 6), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


class Feed(nn.Sequential):
    """The two Linear layers of a transformer's block."""

    def __init__(self, d: int) -> None:
        super().__init__(nn.Linear(d, d + 1), nn.GELU(), nn.Linear(d + 1, d))


class ViT(nn.Module):
    """Patches, a class token and positions as bare parameters, one pre-norm block of nn.MultiheadAttention."""

    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, d, 4, stride=4)
        self.cls, self.positions = nn.Parameter(torch.zeros(1, 1, d)), nn.Parameter(0.1 * torch.randn(1, 5, d))
        self.norm1, self.norm2, self.norm = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention, self.mlp = nn.MultiheadAttention(d, 2, batch_first=True), Feed(d)
        self.head = nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).mT
        h = torch.cat([self.cls.expand(len(h), -1, -1), h], 1) + self.positions
        y = self.norm1(h)
        h = h + self.attention(y, y, y, need_weights=False)[0]
        h = h + self.mlp(self.norm2(h))
        return self.head(self.norm(h)[:, 0])


def heads(x: Tensor) -> Tensor:
    """(N, T, 2 d) to (N, 2, T, d)."""
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


class GPT(nn.Module):
    """One block of GPT-2: fused projections, a causal kernel, and an output layer tied to the embedding."""

    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(SHADES, d), nn.Embedding(8, d)
        self.ln1, self.ln2, self.ln = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.attend, self.out, self.mlp = nn.Linear(d, 3 * d), nn.Linear(d, d), Feed(d)
        self.lm_head = nn.Linear(d, SHADES, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        q, k, v = map(heads, self.attend(self.ln1(h)).chunk(3, -1))
        h = h + self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.lm_head(self.ln(h + self.mlp(self.ln2(h))))


class BERT(nn.Module):
    """One post-norm block, three projections, an attention mask, and a head for hidden tokens."""

    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(SHADES + 2, d, padding_idx=SHADES + 1), nn.Embedding(8, d)
        self.ln, self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.query, self.key, self.value, self.out = (nn.Linear(d, d) for _ in range(4))
        self.mlp, self.decoder = Feed(d), nn.Linear(d, SHADES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.ln(self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1])))
        q, k, v = (heads(layer(h)) for layer in (self.query, self.key, self.value))
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~attention_mask.bool()[:, None, None], -torch.inf)
        h = self.ln1(h + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        return self.decoder(self.ln2(h + self.mlp(h)))


class Tagger(nn.Module):
    """An embedding, a GRU in both directions, and a tag for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(SHADES + 1, 3, padding_idx=SHADES)
        self.gru, self.tag = nn.GRU(3, 3, batch_first=True, bidirectional=True), nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tag(self.gru(self.embed(tokens))[0])


class UNet(nn.Module):
    """Down by a strided convolution, up by a transposed one, a bridge beside them; classes on the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.down, self.up = nn.Conv2d(4, 4, 2, stride=2), nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.merge, self.leave = nn.Conv2d(7, 4, 1), nn.Conv2d(4, SHADES, 1)

    def forward(self, x: Tensor) -> Tensor:
        bridge = functional.silu(self.norm(self.enter(x)))
        up = self.up(functional.silu(self.down(bridge)))
        return self.leave(functional.silu(self.merge(torch.cat([bridge, up], 1))))


class Experts(nn.Module):
    """A Mixture of Experts over tokens: each token goes to one of three, weighted by the router."""

    def __init__(self, d: int = 5) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(SHADES, d), nn.LayerNorm(d)
        self.router, self.experts = nn.Linear(d, 3, bias=False), nn.ModuleList(Feed(d) for _ in range(3))
        self.mix, self.head = nn.Conv1d(d, d, 3, padding=1), nn.Linear(d, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        h = h + self.mix(h.mT).mT
        flat = self.norm(h).flatten(0, 1)
        weights, chosen = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            here = (chosen == number).nonzero().squeeze(1)
            out = out.index_add(0, here, weights[here, None] * expert(flat[here]))
        return self.head((h + out.view_as(h)).mean(1))


# ---- data --------------------------------------------------------------------------------------------------------


def digits(N: int) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) of zero mean and unit scale, and their labels."""
    images, labels = datasets.load("digits", progress=False).train
    return ((images[:N] - images.mean()) / images.std()).reshape(-1, 1, 8, 8), labels[:N]


def texts(N: int, length: int) -> tuple[Tensor, Tensor]:
    """The pixels of the images' middle as tokens (N, length) of three shades, and the labels."""
    images, labels = digits(N)
    small = functional.avg_pool2d(images, 2).flatten(1)[:, 4 : 4 + length]
    return (small > -0.5).long() + (small > 0.5).long(), labels


def of_images(N: int) -> tuple[Any, Tensor]:
    return digits(N)


def next_tokens(N: int) -> tuple[Any, Tensor]:
    """The last token has no next one."""
    tokens, _ = texts(N, 6)
    return tokens, torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORED)], 1)


def hidden_tokens(N: int) -> tuple[Any, Tensor]:
    """Every third token is hidden and to be told; texts have different lengths."""
    tokens, _ = texts(N, 7)
    place = torch.arange(7)
    there = place < 4 + torch.arange(N).unsqueeze(1) % 4
    told = there & ((place + torch.arange(N).unsqueeze(1)) % 3 == 0)
    ids = tokens.masked_fill(told, SHADES).masked_fill(~there, SHADES + 1)
    return {"input_ids": ids, "attention_mask": there.long()}, tokens.masked_fill(~told, IGNORED)


def darker(N: int) -> tuple[Any, Tensor]:
    """Whether the next token is darker; texts have different lengths."""
    tokens, _ = texts(N, 7)
    there = torch.arange(6) < 3 + torch.arange(N).unsqueeze(1) % 4
    tags = (tokens[:, 1:] > tokens[:, :-1]).long()
    return tokens[:, :6].masked_fill(~there, SHADES), tags.masked_fill(~there, IGNORED)


def shades(N: int) -> tuple[Any, Tensor]:
    """The shade of each pixel of an image of 4 x 4 in its noise; the corners are left out."""
    images = functional.avg_pool2d(digits(N)[0], 2)
    targets = (images[:, 0] > -0.5).long() + (images[:, 0] > 0.5).long()
    targets[:, ::3, ::3] = IGNORED
    return images + 0.3 * torch.randn_like(images), targets


def labelled(N: int) -> tuple[Any, Tensor]:
    return texts(N, 5)


@dataclass(frozen=True)
class Case:
    """An architecture.

    Attributes:
        build: the network.
        data: inputs and targets of N examples.
        generic: the layers that have no structure.
        aligned: whether all layers with factors have the same positions, over which K-FAC then couples them.
        class_axis: of its outputs.
    """

    build: Callable[[], nn.Module]
    data: Callable[[int], tuple[Any, Tensor]]
    generic: tuple[str, ...] = ()
    aligned: bool = False
    class_axis: int = -1

    @property
    def likelihood(self) -> fv.Categorical:
        """Of its outputs."""
        return fv.Categorical(class_axis=self.class_axis)


EXPERTS = tuple(f"experts.{number}.{layer}" for number in range(3) for layer in (0, 2))
CASES = {
    "ResNet": Case(ResNet, of_images),
    "MobileNet": Case(MobileNet, of_images),
    "ViT": Case(ViT, of_images, generic=("",)),
    "GPT": Case(GPT, next_tokens, aligned=True),
    "BERT": Case(BERT, hidden_tokens, aligned=True),
    "GRU tagger": Case(Tagger, darker, generic=("gru",), aligned=True),
    "U-Net": Case(UNet, shades, class_axis=1),
    "Mixture of Experts": Case(Experts, labelled, generic=EXPERTS),
}


def parts(inputs: Any) -> tuple[Tensor, ...]:
    """The inputs as positional arguments."""
    return tuple(inputs.values()) if isinstance(inputs, dict) else (inputs,)


def loss_of(case: Case, net: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
    """The mean over examples of what counts, as the likelihood has it."""
    z = net(*parts(inputs))
    z = z.movedim(case.class_axis, -1).flatten(0, -2)
    return functional.cross_entropy(z, targets.flatten(), ignore_index=IGNORED, reduction="sum") / len(targets)


def trained(case: Case, N: int = 64, steps: int = 20) -> nn.Module:
    """The network after some steps of Adam, in float64 and evaluation mode."""
    net = case.build().double()
    inputs, targets = in_double(case.data(N))
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(case, net, inputs, targets).backward()
        optimizer.step()
    return net.eval()


def in_double(data: tuple[Any, Tensor]) -> tuple[Any, Tensor]:
    """Images in float64."""
    inputs, targets = data
    return inputs.double() if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs, targets
