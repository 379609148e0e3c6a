"""Kinds of layers, with the options that change what they compute."""

import torch
from torch import nn

from tests.trust.catalogue.parts import formula, linear
from tests.trust.catalogue.row import Row, drawn, normal


def tokens(*shape, size=7, seed=2):
    """Whole numbers, the same whenever it is called."""
    return torch.randint(size, shape, generator=torch.Generator().manual_seed(seed))


def pooled(*modules, width):
    """A builder of convolutions, their mean over pixels and a head."""
    return lambda: nn.Sequential(
        *[m() for m in modules], nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2)
    )


def tied(first, second, *shape):
    """Two modules that share the first one's weight, then a head."""

    def make():
        a, b = first(), second()
        b.weight = a.weight
        return nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), nn.Flatten(), nn.Linear(shape[0] * shape[1], 2))

    return make


class TableAndHead(nn.Module):
    """A table that scales its own rows, which are the head's weight too."""

    def __init__(self, **options):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 3, **options), nn.Linear(3, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(torch.tanh(self.table(x).sum(1)))


class Attention(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self, **options):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True, **options), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0].mean(1))


def rows():
    """The rows of this kind."""
    images, sequences = (lambda: normal(3, 4, 4, 5)), (lambda: normal(5, 2, 5))
    every = {"kernel_size": (2, 4), "stride": (2, 1), "padding": (2, 3), "dilation": (1, 2), "groups": 2}
    found = [
        Row(f"convolution, {mode}, groups, stride, dilation, even kernel",
            drawn(pooled(lambda m=mode: nn.Conv2d(4, 6, padding_mode=m, **every), width=6)), images)
        for mode in ("zeros", "reflect", "replicate", "circular")
    ]  # fmt: skip
    same = {"kernel_size": (2, 4), "padding": "same", "groups": 2, "padding_mode": "circular"}
    stepped = {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2, "dilation": (1, 2)}
    conv = lambda **options: lambda: nn.Conv1d(2, 2, 3, **options)  # noqa: E731
    found += [
        Row("convolution, same, circular, even kernel, groups", drawn(pooled(lambda: nn.Conv2d(4, 4, **same), width=4)),
            images),
        Row("transposed, groups, stride, dilation, output padding",
            drawn(pooled(lambda: nn.ConvTranspose2d(4, 6, (2, 3), **stepped), width=6)), lambda: normal(3, 4, 3, 3)),
        Row("channels_last", drawn(lambda: pooled(lambda: nn.Conv2d(4, 3, 2), width=3)().to(
            memory_format=torch.channels_last)), lambda: images().to(memory_format=torch.channels_last)),
        Row("convolutions of two dilations, tied", drawn(tied(conv(padding=1), conv(padding=2, dilation=2), 2, 5)),
            sequences),
        Row("convolution tied to a transposed one",
            drawn(tied(conv(padding=1), lambda: nn.ConvTranspose1d(2, 2, 3, padding=1), 2, 5)), sequences),
        Row("convolution of an image without a batch axis",
            drawn(formula(lambda m, x: m[1](torch.tanh(m[0](x.T.unsqueeze(0)))[0].T), lambda: nn.Conv1d(3, 4, 1),
                          linear(4, 2))), lambda: normal(6, 3)),
        Row("table with max_norm", drawn(lambda: nn.Sequential(nn.Embedding(7, 3, max_norm=0.5), nn.Flatten(),
                                                               nn.Tanh(), nn.Linear(6, 2))), lambda: tokens(5, 2)),
        Row("table with max_norm that is the head", drawn(lambda: TableAndHead(max_norm=0.5)), lambda: tokens(5, 2),
            "changes with the other examples"),
        Row("table that is the head", drawn(TableAndHead), lambda: tokens(5, 2)),
        Row("table, padding counted from the end",
            drawn(lambda: nn.Sequential(nn.Embedding(7, 3, padding_idx=-1), nn.Flatten(), nn.Linear(6, 2))),
            lambda: tokens(8, 2)),
        Row("table with scale_grad_by_freq",
            drawn(lambda: nn.Sequential(nn.Embedding(7, 3, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(6, 2))),
            lambda: torch.tensor([[0, 0], [1, 2], [3, 3], [4, 0], [5, 6]])),
        *[Row(f"bag, {mode}", drawn(lambda m=mode: nn.Sequential(nn.EmbeddingBag(7, 3, mode=m), nn.Tanh(),
                                                                 nn.Linear(3, 2))), lambda: tokens(5, 3))
          for mode in ("sum", "mean", "max")],
        Row("bag with offsets", drawn(formula(lambda m, x, offsets: m[1](m[0](x, offsets)),
                                              lambda: nn.EmbeddingBag(7, 3), linear(3, 2))),
            lambda: [((tokens(9), torch.tensor([0, 2, 5])), torch.zeros(9).long())],
            "must count them|belongs to no"),
        Row("bilinear", drawn(formula(lambda m, x: m[1](torch.tanh(m[0](x, x.flip(1)))),
                                      lambda: nn.Bilinear(3, 3, 4), linear(4, 2))), lambda: normal(5, 3)),
        Row("GRU cell called twice", drawn(formula(lambda m, x: m[1](m[0](x, m[0](x))), lambda: nn.GRUCell(3, 3),
                                                   linear(3, 2))), lambda: normal(5, 3)),
        Row("attention, bias_kv and zero attention", drawn(lambda: Attention(add_bias_kv=True, add_zero_attn=True)),
            lambda: normal(3, 3, 4)),
        Row("attention with Dropout in training mode", lambda: drawn(lambda: Attention(dropout=0.5))().train(),
            lambda: normal(3, 3, 4), "draws at random in training mode"),
        Row("BatchNorm of a running mean over all", drawn(lambda: nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None), nn.Tanh(), nn.Linear(4, 2))), lambda: normal(5, 3)),
        Row("BatchNorm in training mode", lambda: drawn(lambda: nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))().train(), lambda: normal(5, 3),
            "couples the examples"),
        Row("InstanceNorm that tracks, in training mode", lambda: drawn(lambda: nn.Sequential(
            nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.Tanh(), nn.Flatten(),
            nn.Linear(12, 2)))().train(), lambda: normal(5, 2, 5)),
        *[Row(f"{kind.__name__} in training mode", lambda k=kind: drawn(lambda: nn.Sequential(
            nn.Linear(3, 4), k(), nn.Linear(4, 2)))().train(), lambda: normal(5, 3), "draws at random in training mode")
          for kind in (nn.Dropout, nn.AlphaDropout, nn.RReLU)],
    ]  # fmt: skip
    return found
