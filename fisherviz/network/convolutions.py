"""Convolutions and their transposes: filters multiply patches of the input, pixels of the output are positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherviz.network.base import Kind, Stored

_UNFOLD_ENTRIES = 2**20
"""Entries of patches that are unfolded at once, about."""


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

    def is_single(self, module: Any, x: Tensor) -> bool:
        """One image."""
        return x.dim() == 1 + len(module.kernel_size)

    def unfold(self, module: Any, x: Tensor) -> Tensor:
        """Patches."""
        columns = convolution_patches(module, x)
        return columns.unflatten(2, (module.groups, -1)) if module.groups > 1 else columns

    def positions(self, module: Any, x: Tensor) -> int:
        """Pixels of the output."""
        return convolution_patches(module, x[:1, :1]).shape[1]

    def outputs(self, module: Any, g: Tensor) -> Tensor:
        """Channels last."""
        g = g.flatten(3).transpose(2, 3)
        return g.unflatten(3, (module.groups, -1)) if module.groups > 1 else g

    def with_bias(self, module: Any, x: Tensor) -> Tensor:
        """Patches with the bias coordinate, some examples at a time: large temporaries cost by their fresh pages."""
        entries = self.positions(module, x) * self.groups(module) * self.fan_in(module)
        step = max(1, _UNFOLD_ENTRIES // max(1, entries))
        columns: Tensor | None = None
        for start in range(0, max(1, len(x)), step):
            part = self.unfold(module, x[start : start + step])
            if columns is None:
                columns = part.new_empty(len(x), *part.shape[1:-1], part.shape[-1] + 1)
                columns[..., -1] = 1
            columns[start : start + step, ..., :-1] = part
        assert columns is not None
        return columns


class TransposedConvolution(Convolution):
    """The transpose of a convolution: every pixel of the output sees those pixels of the input that it came from.

    Args:
        name: of the kind.
        size: pixels of the output by dimension; a call may choose among several that go with its input.
    """

    def __init__(self, name: str, size: Sequence[int] = ()) -> None:
        super().__init__(name)
        self.size = size

    def called(self, shape: torch.Size) -> TransposedConvolution:
        """With the output's size."""
        return TransposedConvolution(self.name, shape[2:])

    def stored(self, module: Any) -> Stored:
        """Input channels before output channels, within each group."""
        inside, outside = module.in_channels // module.groups, module.out_channels // module.groups
        return Stored((module.groups, inside, outside, math.prod(module.kernel_size)), (0, 2, 1, 3))

    def fan_in(self, module: Any) -> int:
        """Channels of a group times pixels of the kernel."""
        return module.in_channels // module.groups * math.prod(module.kernel_size)

    def unfold(self, module: Any, x: Tensor) -> Tensor:
        """Pixel (t + padding - dilation k) / stride of the input for output t and kernel k, where there is one."""
        dims = len(self.size)
        for d, pixels in enumerate(self.size):
            t, k = torch.arange(pixels, device=x.device), torch.arange(module.kernel_size[d], device=x.device)
            came = t.unsqueeze(1) + module.padding[d] - module.dilation[d] * k
            source, last = came // module.stride[d], x.shape[2 + 2 * d]
            there = (came % module.stride[d] == 0) & (source >= 0) & (source < last)
            x = nn.functional.pad(x, [0, 0] * (x.dim() - 3 - 2 * d) + [0, 1])  # the zero
            x = x.index_select(2 + 2 * d, torch.where(there, source, last).flatten())
            x = x.unflatten(2 + 2 * d, came.shape)
        x = x.permute(0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2)).flatten(1, dims)
        return x.unflatten(2, (module.groups, -1)).flatten(3) if module.groups > 1 else x.flatten(2)

    def positions(self, module: Any, x: Tensor) -> int:
        """Pixels of the output."""
        return math.prod(self.size)


def convolution_patches(module: nn.Module, x: Tensor) -> Tensor:
    """Patches (N, T, C kernel) that a convolution multiplies its filters with, padding included.

    In memory positions come last, as pixels do in x: rows of pixels are copied whole, several times as fast as
    `torch.nn.functional.unfold`.
    """
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
    # (N, C, out..., kernel...) -> (N, C kernel, T)
    x = x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return x.flatten(2 + dims).flatten(1, 1 + dims).transpose(1, 2)
