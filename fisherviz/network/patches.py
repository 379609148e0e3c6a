"""Patches that a convolution multiplies its filters with, padding included."""

from __future__ import annotations

from torch import Tensor, nn


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
