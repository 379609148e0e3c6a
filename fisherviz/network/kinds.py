"""The kinds of layers with structure: how each kind's inputs and output gradients become rows of its matrix W̄.

A layer of weight sharing acts at T positions: s_t = W̄ ā_t. A new kind is a class here and a line in `KINDS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_UNFOLD_ENTRIES = 2**20
"""Entries of patches that are unfolded at once, about."""


class Stored(NamedTuple):
    """A weight whose entries do not lie in memory as in W̄ (rows, columns).

    Attributes:
        shape: the weight's, or a finer one.
        axes: the order of its axes that makes them lie so.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]


class Kind(ABC):
    """What a class of modules has in common; its weight is (d_out, ...), its bias (d_out,)."""

    name = ""
    """What the kind is called; "" for the module's class."""
    own_inputs = False
    """Whether every unit has an input of its own: such a layer has unit blocks, but no Kronecker factors."""

    one_hot = False
    """Whether the inputs are one-hot: `unfold` gives their positions (N, T), never the inputs."""

    def refusal(self, module: Any) -> str:
        """Why a module of the kind has no structure; "" where it has."""
        return ""

    def stored(self, module: Any) -> Stored | None:
        """How the weight's entries lie in memory; None: row by row, as in W̄."""
        return None

    @abstractmethod
    def units(self, module: Any) -> int:
        """Output units or channels d_out."""

    def groups(self, module: Any) -> int:
        """Groups of units that see inputs of their own."""
        return 1

    def fan_in(self, module: Any) -> int:
        """Inputs of one output unit, without the bias."""
        return math.prod(module.weight.shape[1:])

    @abstractmethod
    def unfold(self, module: Any, x: Tensor) -> Tensor:
        """What the weight multiplies: (N, T, fan_in), or (N, T, groups, fan_in)."""

    @abstractmethod
    def positions(self, module: Any, x: Tensor) -> int:
        """Positions T that share the weight."""

    @abstractmethod
    def outputs(self, module: Any, g: Tensor) -> Tensor:
        """Gradients (K, N, ...) at the module's output as (K, N, T, dg), or (K, N, T, groups, dg)."""

    def ones(self, module: Any, x: Tensor) -> Tensor:
        """The bias coordinate alone, for a frozen weight."""
        groups = (self.groups(module),) if self.groups(module) > 1 else ()
        return x.new_ones(len(x), self.positions(module, x), *groups, 1)

    def with_bias(self, module: Any, x: Tensor) -> Tensor:
        """What W̄ multiplies: `unfold` with the bias coordinate appended."""
        columns = self.unfold(module, x)
        return torch.cat([columns, columns.new_ones(*columns.shape[:-1], 1)], -1)


class Linear(Kind):
    """A matrix on the last dimension; all dimensions between are positions."""

    name = "linear"

    def units(self, module: nn.Linear) -> int:
        """Output features."""
        return module.out_features

    def unfold(self, module: nn.Linear, x: Tensor) -> Tensor:
        """The input, (N, T, d_in)."""
        return x.reshape(len(x), -1, x.shape[-1])

    def positions(self, module: nn.Linear, x: Tensor) -> int:
        """Tokens."""
        return math.prod(x.shape[1:-1])

    def outputs(self, module: nn.Linear, g: Tensor) -> Tensor:
        """Gradients as they are."""
        return g.reshape(*g.shape[:2], math.prod(g.shape[2:-1]), g.shape[-1])


class TransposedLinear(Linear):
    """A matrix on the last dimension, kept as (d_in, d_out): GPT-2's Conv1D."""

    def units(self, module: Any) -> int:
        """Output features."""
        return module.weight.shape[1]

    def fan_in(self, module: Any) -> int:
        """Input features."""
        return module.weight.shape[0]

    def stored(self, module: Any) -> Stored:
        """Column by column."""
        return Stored(tuple(module.weight.shape), (1, 0))


class Convolution(Kind):
    """Filters on patches of one to three dimensions; pixels of the output are positions.

    Args:
        name: of the kind.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def units(self, module: Any) -> int:
        """Output channels."""
        return module.out_channels

    def groups(self, module: Any) -> int:
        """The module's."""
        return module.groups

    def unfold(self, module: Any, x: Tensor) -> Tensor:
        """Patches."""
        if module.groups == 1 and (fast := fast_patches(module, x)) is not None:
            return fast
        columns = convolution_patches(module, x)  # (N, T, C, kernel)
        if module.groups > 1:
            columns = columns.unflatten(2, (module.groups, -1))
        return columns.flatten(-2)

    def positions(self, module: Any, x: Tensor) -> int:
        """Pixels of the output."""
        return convolution_patches(module, x[:1, :1]).shape[1]

    def outputs(self, module: Any, g: Tensor) -> Tensor:
        """Channels last."""
        g = g.flatten(3).transpose(2, 3)
        return g.unflatten(3, (module.groups, -1)) if module.groups > 1 else g

    def with_bias(self, module: Any, x: Tensor) -> Tensor:
        """Patches with the bias coordinate, some examples at a time: large temporaries cost by their fresh pages."""
        step = max(1, _UNFOLD_ENTRIES // max(1, x[:1].numel() * math.prod(module.kernel_size)))
        columns: Tensor | None = None
        for start in range(0, max(1, len(x)), step):
            part = self.unfold(module, x[start : start + step])
            if columns is None:
                columns = part.new_empty(len(x), *part.shape[1:-1], part.shape[-1] + 1)
                columns[..., -1] = 1
            columns[start : start + step, ..., :-1] = part
        assert columns is not None
        return columns


class Scale(Kind):
    """A scale, and a shift, for each feature: what normalisation does once it has normalised, and PReLU below zero.

    Args:
        multiplied: what the scale multiplies, of the module and its input.
        last: whether features are the last dimensions of the input, not the second one.
    """

    own_inputs = True

    def __init__(self, multiplied: Callable[[Any, Tensor], Tensor], *, last: bool = False) -> None:
        self.multiplied, self.last = multiplied, last

    def units(self, module: Any) -> int:
        """Features."""
        return module.weight.numel()

    def groups(self, module: Any) -> int:
        """Features."""
        return module.weight.numel()

    def fan_in(self, module: Any) -> int:
        """The feature itself."""
        return 1

    def unfold(self, module: Any, x: Tensor) -> Tensor:
        """What is scaled, in float32 at least."""
        return self._by_feature(module, self.multiplied(module, x.to(torch.promote_types(x.dtype, torch.float32))), 1)

    def positions(self, module: Any, x: Tensor) -> int:
        """Entries of a feature: pixels or tokens."""
        return math.prod(x.shape[1:]) // self.units(module)

    def outputs(self, module: Any, g: Tensor) -> Tensor:
        """Gradients as they are."""
        return self._by_feature(module, g, 2)

    def with_bias(self, module: Any, x: Tensor) -> Tensor:
        """What is scaled, and ones: with its positions last in memory, over which all products sum."""
        scaled = self.unfold(module, x)  # (N, T, features, 1), or (N, T, 1)
        whole = scaled.new_ones(len(x), *scaled.shape[2:-1], 2, scaled.shape[1])
        whole.select(-2, 0).copy_(scaled.squeeze(-1).movedim(1, -1))
        return whole.movedim(-1, 1)

    def _by_feature(self, module: Any, x: Tensor, leading: int) -> Tensor:
        """(..., T, features, 1) from (..., features, pixels) or (..., tokens, features); (..., T, 1) of one feature."""
        features, before = self.units(module), x.shape[:leading]
        positions = math.prod(x.shape[leading:]) // features
        if self.last:
            x = x.reshape(*before, positions, features)
        else:
            x = x.reshape(*before, features, positions).transpose(-1, -2)
        return x.unsqueeze(-1) if features > 1 else x


class Embedding(Kind):
    """Rows of a table by their positions: a matrix (d, V) on one-hot inputs."""

    name = "embedding"
    one_hot = True

    def refusal(self, module: nn.Embedding) -> str:
        """Tables that a forward changes, or whose gradients depend on the other examples."""
        if module.max_norm is not None:
            return "max_norm changes its weight in the forward"
        return "scale_grad_by_freq weights its gradients by the batch" if module.scale_grad_by_freq else ""

    def units(self, module: nn.Embedding) -> int:
        """Width of a row."""
        return module.embedding_dim

    def fan_in(self, module: nn.Embedding) -> int:
        """Rows of the table."""
        return module.num_embeddings

    def stored(self, module: nn.Embedding) -> Stored:
        """The table is the transpose."""
        return Stored((module.num_embeddings, module.embedding_dim), (1, 0))

    def unfold(self, module: nn.Embedding, x: Tensor) -> Tensor:
        """Rows that are read."""
        return x.reshape(len(x), -1).long()

    def weights(self, module: Any, tokens: Tensor) -> Tensor:
        """What they are multiplied by, (N, T): 0 for padding, which has no gradient."""
        read = torch.ones_like(tokens) if module.padding_idx is None else tokens != module.padding_idx
        return read.to(module.weight.dtype)

    def positions(self, module: nn.Embedding, x: Tensor) -> int:
        """Tokens."""
        return math.prod(x.shape[1:])

    def outputs(self, module: nn.Embedding, g: Tensor) -> Tensor:
        """Gradients as they are."""
        return g.reshape(*g.shape[:2], math.prod(g.shape[2:-1]), g.shape[-1])


class EmbeddingBag(Embedding):
    """Sums or means of a table's rows: all of an example's rows have its one output gradient."""

    def refusal(self, module: Any) -> str:
        """Maxima are no sums."""
        return "a maximum over rows is no sum" if module.mode == "max" else super().refusal(module)

    def weights(self, module: Any, tokens: Tensor) -> Tensor:
        """Ones, or one over the number of rows."""
        read = super().weights(module, tokens)
        return read / read.sum(1, keepdim=True).clamp(min=1) if module.mode == "mean" else read


def batch_normalised(module: Any, x: Tensor) -> Tensor:
    """By the running moments, or by the batch's own where the module takes these."""
    if module.training or module.running_mean is None:
        return nn.functional.batch_norm(x, None, None, training=True, eps=module.eps)
    mean, variance = (moment.to(x.dtype) for moment in (module.running_mean, module.running_var))
    return nn.functional.batch_norm(x, mean, variance, eps=module.eps)


def instance_normalised(module: Any, x: Tensor) -> Tensor:
    """By each example's own moments, or by the running ones where the module takes these."""
    if module.training or not module.track_running_stats:
        return nn.functional.instance_norm(x, eps=module.eps)
    return batch_normalised(module, x)


def group_normalised(module: nn.GroupNorm, x: Tensor) -> Tensor:
    """By the moments of each group of channels."""
    return nn.functional.group_norm(x, module.num_groups, eps=module.eps)


def layer_normalised(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """By the moments of the last dimensions."""
    return nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)


def rms_normalised(module: nn.RMSNorm, x: Tensor) -> Tensor:
    """By the mean square of the last dimensions; half precisions take float32's eps, as in torch."""
    return nn.functional.rms_norm(x, module.normalized_shape, eps=module.eps)


def negative_part(module: nn.PReLU, x: Tensor) -> Tensor:
    """What PReLU scales."""
    return x.clamp(max=0)


KINDS: dict[Callable[..., Any] | str, Kind] = {
    nn.modules.batchnorm._BatchNorm.forward: Scale(batch_normalised),
    nn.modules.instancenorm._InstanceNorm.forward: Scale(instance_normalised),
    nn.GroupNorm.forward: Scale(group_normalised),
    nn.LayerNorm.forward: Scale(layer_normalised, last=True),
    nn.RMSNorm.forward: Scale(rms_normalised, last=True),
    nn.PReLU.forward: Scale(negative_part),
    nn.Embedding.forward: Embedding(),
    nn.EmbeddingBag.forward: EmbeddingBag(),
    nn.Linear.forward: Linear(),
    "transformers.pytorch_utils.Conv1D.forward": TransposedLinear(),
    nn.Conv1d.forward: Convolution("conv1d"),
    nn.Conv2d.forward: Convolution("conv2d"),
    nn.Conv3d.forward: Convolution("conv3d"),
}
"""By the forward that computes it (of other libraries by its name): a subclass with its own is another function."""


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module; None where it has no structure that is known."""
    forward = type(module).forward
    return KINDS.get(forward) or KINDS.get(f"{forward.__module__}.{forward.__qualname__}")


def fast_patches(module: nn.Module, x: Tensor) -> Tensor | None:
    """Patches (N, T, C kernel) of a two-dimensional convolution with padding by zeros, by torch's own unfolding."""
    if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    columns = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    return columns.transpose(1, 2)


def convolution_patches(module: nn.Module, x: Tensor) -> Tensor:
    """Patches (N, T, C, kernel) that a convolution multiplies its filters with, padding included."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    dims = len(module.kernel_size)
    pad: list[int] = []
    for d in reversed(range(dims)):
        if module.padding == "same":
            total = module.dilation[d] * (module.kernel_size[d] - 1)
            pad += [total // 2, total - total // 2]
        elif module.padding == "valid":
            pad += [0, 0]
        else:
            pad += [int(module.padding[d])] * 2
    if any(pad):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = nn.functional.pad(x, pad, mode=mode)
    for d in range(dims):
        span = module.dilation[d] * (module.kernel_size[d] - 1) + 1
        x = x.unfold(2 + d, span, module.stride[d])[..., :: module.dilation[d]]
    # (N, C, out..., kernel...) -> (N, T, C, kernel)
    x = x.flatten(2 + dims)
    return x.movedim(1, -2).flatten(1, dims)
