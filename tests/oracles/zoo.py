"""One small network and its inputs for every kind of layer: name -> (build, data)."""

from copy import deepcopy

import torch
from torch import nn

from tests.oracles import nets
from tests.oracles.zoo_modules import (
    Attention,
    Bare,
    Checkpointed,
    Cubic,
    Detached,
    Discarded,
    Doubled,
    Experts,
    Keyword,
    LastToken,
    Merged,
    OnlySideDoor,
    PartlyFrozenByNoGrad,
    Recurring,
    Residual,
    SelfBilinear,
    Siamese,
    SideDoor,
    Squaring,
    Tied,
    TiedEmbedding,
    TokensFirst,
    TwoScales,
    Unsqueezed,
    Unused,
    images,
    pruned,
    sent_to_experts,
    with_hook,
)


def sequence(*modules):
    """A builder of networks that share nothing: modules are copied, classes called."""
    return lambda: nn.Sequential(*[m() if isinstance(m, type) else deepcopy(m) for m in modules])


def conv(kind, *arguments, size, **options):
    """A case with two convolutions, so that cross blocks are checked too."""

    def build():
        out = arguments[1]
        return nn.Sequential(kind(*arguments, **options), nn.Tanh(), kind(out, 2, 1), nets.MeanPixels())

    return build, lambda: images(arguments[0], *size, N=2)


LINEAR = {
    "linear": (sequence(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), lambda: images(3)),
    "linear without bias": (
        sequence(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)),
        lambda: images(3),
    ),
    "linear on tokens": (
        sequence(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nets.MeanTokens),
        lambda: images(5, 3),
    ),
    "linear on a grid of tokens": (
        sequence(nn.Linear(3, 2), nn.Tanh(), nets.MeanTokens, nn.Linear(2, 2), nets.MeanTokens),
        lambda: images(2, 3, 3),
    ),
    "relu in place": (
        sequence(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)),
        lambda: images(3),
    ),
    "module called twice": (Recurring, lambda: images(3)),
    "convolution called on two sizes": (TwoScales, lambda: images(1, 4, 4)),
    "residual additions in place": (Residual, lambda: images(3)),
    "linear called by keyword": (Keyword, lambda: images(3)),
    "both versions of an example in one batch": (Siamese, lambda: images(3)),
    "mixture of experts": (Experts, sent_to_experts),
    "linear without a batch axis": (Unsqueezed, lambda: images(3)),
    "token axis first": (TokensFirst, lambda: images(4, 3)),
    "as many tokens as examples, token axis first": (TokensFirst, lambda: images(3, 3)),
    "examples and tokens merged": (Merged, lambda: images(4, 3)),
}
CONVOLUTION = {
    "conv1d": conv(nn.Conv1d, 2, 3, 3, size=(6,)),
    "conv1d stride and padding": conv(nn.Conv1d, 2, 3, 3, size=(6,), stride=2, padding=2),
    "conv1d same, dilated": conv(nn.Conv1d, 2, 3, 3, size=(6,), padding="same", dilation=2),
    "conv1d same, even kernel": conv(nn.Conv1d, 2, 3, 4, size=(6,), padding="same"),
    "conv2d": conv(nn.Conv2d, 2, 3, (3, 2), size=(5, 4)),
    "conv2d one pixel out": conv(nn.Conv2d, 2, 3, (5, 4), size=(5, 4)),
    "conv2d stride, padding, dilation": conv(
        nn.Conv2d, 2, 3, (2, 3), size=(5, 6), stride=(2, 1), padding=(1, 2), dilation=(1, 2)
    ),
    "conv2d valid": conv(nn.Conv2d, 2, 3, 2, size=(3, 4), padding="valid"),
    "conv2d same, even kernel": conv(nn.Conv2d, 2, 3, (2, 4), size=(4, 5), padding="same"),
    "conv2d without bias": conv(nn.Conv2d, 2, 3, 2, size=(3, 3), bias=False),
    "conv2d in two groups": conv(nn.Conv2d, 4, 6, 2, size=(3, 3), groups=2),
    "conv2d depthwise": conv(nn.Conv2d, 3, 6, 2, size=(3, 3), groups=3, bias=False),
    "conv3d": conv(nn.Conv3d, 2, 2, 2, size=(3, 3, 2)),
    "conv3d everything": conv(
        nn.Conv3d, 2, 2, 2, size=(4, 3, 3), stride=(2, 1, 1), padding=(1, 0, 1), dilation=(1, 2, 1), groups=2
    ),
    **{
        f"conv{dims}d {mode}, padding {padding}": conv(
            kind, 2, 2, 3, size=(4,) * dims, padding=padding, padding_mode=mode
        )
        for dims, kind in ((1, nn.Conv1d), (2, nn.Conv2d))
        for mode in ("zeros", "reflect", "replicate", "circular")
        for padding in (1, "same")
    },
    **{
        f"conv3d {mode}": conv(nn.Conv3d, 1, 2, 3, size=(3, 3, 3), padding=(1, 0, 1), padding_mode=mode)
        for mode in ("reflect", "replicate", "circular")
    },
}
GENERIC = {
    "layer norm": (sequence(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)), lambda: images(3)),
    "batch norm in evaluation": (
        sequence(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)),
        lambda: images(3),
    ),
    "batch norm 2d in evaluation": (
        sequence(nn.Conv2d(1, 2, 2, bias=False), nn.BatchNorm2d(2), nn.Tanh(), nets.MeanPixels),
        lambda: images(1, 3, 3),
    ),
    "group norm": (
        sequence(nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nets.MeanPixels),
        lambda: images(1, 3, 3),
    ),
    "prelu": (sequence(nn.Linear(3, 3), nn.PReLU(3), nn.Linear(3, 2)), lambda: images(3)),
    "embedding": (
        sequence(nn.Embedding(5, 3), nets.MeanTokens, nn.Linear(3, 2)),
        lambda: torch.randint(5, (4, 3)),
    ),
    "embedding with padding": (
        sequence(nn.Embedding(5, 3, padding_idx=0), nets.MeanTokens, nn.Linear(3, 2)),
        lambda: torch.tensor([[0, 1], [2, 0], [3, 3]]),
    ),
    "attention": (Attention, lambda: images(3, 4)),
    "transposed convolution": (
        sequence(nn.ConvTranspose2d(2, 2, 2, stride=2), nn.Tanh(), nets.MeanPixels),
        lambda: images(2, 2, 2),
    ),
    "bare parameters of the root": (Bare, lambda: images(3)),
    "tied parameters": (Tied, lambda: images(3)),
    "embedding tied to the output": (TiedEmbedding, lambda: torch.randint(5, (4, 3))),
    "module of one's own": (sequence(nn.Linear(3, 3), nn.Tanh(), Cubic), lambda: images(3)),
    "subclass of Linear with another formula": (
        lambda: nn.Sequential(Doubled(3, 2), nn.Tanh(), nn.Linear(2, 2)),
        lambda: images(3),
    ),
    "weight normalised by a parametrisation": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Tanh(), nn.Linear(2, 2)),
        lambda: images(3),
    ),
    "weight of a called layer used directly too": (SideDoor, lambda: images(3)),
    "weight used directly only": (OnlySideDoor, lambda: images(3)),
    "layer that is never called": (Unused, lambda: images(3)),
    "layer whose result is discarded": (Discarded, lambda: images(3)),
    "features under no_grad": (PartlyFrozenByNoGrad, lambda: images(3)),
    "lstm": (lambda: LastToken(nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)), lambda: images(3, 2)),
    "transformer layer": (
        lambda: LastToken(nn.TransformerEncoderLayer(4, 2, 4, dropout=0.1, batch_first=True), nn.Linear(4, 2)),
        lambda: images(2, 4, N=2),
    ),
    "max pooling": (
        sequence(nn.Conv2d(1, 2, 2), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)),
        lambda: images(1, 5, 5),
    ),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 2)),
        lambda: images(3),
    ),
    "checkpointed": (Checkpointed, lambda: images(3)),
    "function of one's own": (
        sequence(nn.Linear(3, 3), nn.LayerNorm(3), Squaring, nn.Linear(3, 2)),
        lambda: images(3),
    ),
    "a path detached": (Detached, lambda: images(3)),
    "user's hook on the output": (with_hook("after"), lambda: images(3)),
    "user's hook on the input": (with_hook("before"), lambda: images(3)),
    "pruned": (pruned, lambda: images(3)),
    "sparse embedding": (
        sequence(nn.Embedding(5, 3, sparse=True), nets.MeanTokens, nn.Linear(3, 2)),
        lambda: torch.randint(5, (4, 3)),
    ),
    "bilinear root": (lambda: SelfBilinear(), lambda: images(3)),
}


CASES = LINEAR | CONVOLUTION | GENERIC
EACH = (
    "linear", "linear without bias", "linear on tokens", "module called twice", "mixture of experts",
    "as many tokens as examples, token axis first", "conv1d same, even kernel", "conv2d stride, padding, dilation",
    "conv2d without bias", "conv2d in two groups", "conv2d depthwise", "conv3d everything",
    "conv1d reflect, padding same", "conv2d circular, padding 1", "layer norm", "batch norm 2d in evaluation",
    "group norm", "prelu", "embedding with padding", "attention", "transposed convolution",
    "bare parameters of the root", "tied parameters", "embedding tied to the output",
    "weight normalised by a parametrisation", "layer that is never called", "layer whose result is discarded", "lstm",
    "transformer layer", "spectral norm", "pruned", "bilinear root",
)  # fmt: skip
"""One of each kind, for what the quick suite asks of fewer than all."""
