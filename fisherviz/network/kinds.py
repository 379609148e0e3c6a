"""The kinds of layers with structure, each with the modules that are of it.

A new kind is a class, here or in a file beside, and a line in `KINDS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fisherviz.network.base import Kind, Stored
from fisherviz.network.convolutions import Convolution, TransposedConvolution


class Linear(Kind):
    """A matrix on the last dimension; all dimensions between are positions."""

    name = "linear"

    def units(self, module: nn.Linear) -> int:
        """Output features."""
        return module.out_features

    def is_single(self, module: Any, x: Tensor) -> bool:
        """One vector."""
        return x.dim() == 1

    def transposed_matrix(self, kind: Kind) -> bool:
        """An embedding's, tied to an output layer."""
        return type(self) is Linear and isinstance(kind, Embedding)

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


class InProjection(Linear):
    """Queries, keys and values of self-attention as one matrix on its input: what nn.MultiheadAttention itself owns."""

    name = ""
    weight, bias = "in_proj_weight", "in_proj_bias"
    unseen = "its queries, keys and values do not come from one tensor"

    def refusal(self, module: Any) -> str:
        """Matrices for queries, keys and values apart, and keys and values of its own."""
        if module.in_proj_weight is None:
            return "its queries, keys and values have matrices of their own, of different widths"
        return "" if module.bias_k is None else "it adds keys and values of its own (add_bias_kv=True)"

    def units(self, module: Any) -> int:
        """Entries of a query, a key and a value."""
        return 3 * module.embed_dim

    def fan_in(self, module: Any) -> int:
        """Input features."""
        return module.embed_dim


class Scale(Kind):
    """A scale, and a shift, for each feature: what normalisation does once it has normalised, and PReLU below zero.

    Args:
        multiplied: what the scale multiplies, of the module and its input.
        last: whether features are the last dimensions of the input, not the second one.
        goes_on: whether an activation follows in the same module.
    """

    own_inputs = True

    def __init__(
        self, multiplied: Callable[[Any, Tensor], Tensor], *, last: bool = False, goes_on: bool = False
    ) -> None:
        self.multiplied, self.last, self.goes_on = multiplied, last, goes_on

    def units(self, module: Any) -> int:
        """Features."""
        return module.weight.numel()

    def groups(self, module: Any) -> int:
        """Features."""
        return module.weight.numel()

    def fan_in(self, module: Any) -> int:
        """The feature itself."""
        return 1

    def is_single(self, module: Any, x: Tensor) -> bool:
        """What is normalised as a whole; one channels-first image of InstanceNorm, or one number of PReLU."""
        if self.last:
            return x.dim() == len(module.normalized_shape)
        images = isinstance(module, nn.modules.instancenorm._InstanceNorm)
        return x.dim() == (module._get_no_batch_dim() if images else 0)

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

    def same_matrix(self, module: nn.Embedding, kind: Kind, other: Any) -> bool:
        """All that reads the table, bags too."""
        return isinstance(kind, Embedding)

    def transposed_matrix(self, kind: Kind) -> bool:
        """An output layer's, tied to the table."""
        return type(kind) is Linear

    def fan_in(self, module: nn.Embedding) -> int:
        """Rows of the table."""
        return module.num_embeddings

    def stored(self, module: nn.Embedding) -> Stored:
        """The table is the transpose."""
        return Stored((module.num_embeddings, module.embedding_dim), (1, 0))

    def is_single(self, module: nn.Embedding, x: Tensor) -> bool:
        """One position."""
        return x.dim() == 0

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


KINDS: dict[str, Kind] = {
    "torch.nn.modules.batchnorm._BatchNorm.forward": Scale(batch_normalised),
    "torch.nn.modules.instancenorm._InstanceNorm.forward": Scale(instance_normalised),
    "torch.nn.modules.normalization.GroupNorm.forward": Scale(group_normalised),
    "torch.nn.modules.normalization.LayerNorm.forward": Scale(layer_normalised, last=True),
    "torch.nn.modules.normalization.RMSNorm.forward": Scale(rms_normalised, last=True),
    "torch.nn.modules.activation.PReLU.forward": Scale(negative_part),
    "torch.nn.modules.sparse.Embedding.forward": Embedding(),
    "torch.nn.modules.sparse.EmbeddingBag.forward": EmbeddingBag(),
    "torch.nn.modules.linear.Linear.forward": Linear(),
    "torch.nn.modules.activation.MultiheadAttention.forward": InProjection(),
    "transformers.pytorch_utils.Conv1D.forward": TransposedLinear(),
    "timm.layers.linear.Linear.forward": Linear(),
    "timm.layers.norm.GroupNorm.forward": Scale(group_normalised),
    "timm.layers.norm.LayerNorm.forward": Scale(layer_normalised, last=True),
    "timm.layers.norm_act.BatchNormAct2d.forward": Scale(batch_normalised, goes_on=True),
    "timm.layers.norm_act.GroupNormAct.forward": Scale(group_normalised, goes_on=True),
    "timm.layers.norm_act.LayerNormAct.forward": Scale(layer_normalised, last=True, goes_on=True),
    "torch.nn.modules.conv.Conv1d.forward": Convolution("conv1d"),
    "torch.nn.modules.conv.Conv2d.forward": Convolution("conv2d"),
    "torch.nn.modules.conv.Conv3d.forward": Convolution("conv3d"),
    "torch.nn.modules.conv.ConvTranspose1d.forward": TransposedConvolution("convtranspose1d"),
    "torch.nn.modules.conv.ConvTranspose2d.forward": TransposedConvolution("convtranspose2d"),
    "torch.nn.modules.conv.ConvTranspose3d.forward": TransposedConvolution("convtranspose3d"),
}
"""By the forward that computes it: a subclass with its own is another function."""


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module; None where it has no structure that is known."""
    forward: Any = type(module).forward
    if hasattr(forward, "__wrapped__"):
        return None  # a function in the place of the class's own, which `functools.wraps` has given its name
    return KINDS.get(f"{forward.__module__}.{forward.__qualname__}")


def attends(module: nn.Module) -> bool:
    """Whether a module is torch's attention, which runs its layers as functions."""
    return isinstance(kind_of(module), InProjection)
