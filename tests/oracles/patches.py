"""What a convolution sees at each of its output positions, found index by index.

No unfolding, no padding function: the input coordinate of every output position and kernel offset is
computed, and one that lies outside is mapped as `padding_mode` says.
"""

from itertools import product

import torch


def pad_before(conv, axis):
    """Zeros (or mirrored cells) before the first input cell; 'same' puts the odd one after."""
    if conv.padding == "valid":
        return 0
    if conv.padding == "same":
        return conv.dilation[axis] * (conv.kernel_size[axis] - 1) // 2
    return conv.padding[axis]


def output_size(conv, axis, size):
    if conv.padding == "same":
        return size
    padded = size if conv.padding == "valid" else size + 2 * conv.padding[axis]
    return (padded - conv.dilation[axis] * (conv.kernel_size[axis] - 1) - 1) // conv.stride[axis] + 1


def source(coordinate, size, mode):
    """The input cell behind a padded coordinate, or None for a zero."""
    if 0 <= coordinate < size:
        return coordinate
    if mode == "zeros":
        return None
    if mode == "replicate":
        return min(max(coordinate, 0), size - 1)
    if mode == "circular":
        return coordinate % size
    assert mode == "reflect"
    return -coordinate if coordinate < 0 else 2 * (size - 1) - coordinate


def patches(conv, x):
    """(N, T, C_in, kernel cells): the receptive field of every output position, before splitting by group."""
    N, channels, *sizes = x.shape
    axes = range(len(sizes))
    out_sizes = [output_size(conv, i, sizes[i]) for i in axes]
    positions = []
    for out in product(*(range(s) for s in out_sizes)):
        cells = []
        for offset in product(*(range(k) for k in conv.kernel_size)):
            where = [
                source(
                    out[i] * conv.stride[i] - pad_before(conv, i) + offset[i] * conv.dilation[i],
                    sizes[i],
                    conv.padding_mode,
                )
                for i in axes
            ]
            inside = None not in where
            cells.append(x[(slice(None), slice(None), *where)] if inside else x.new_zeros(N, channels))
        positions.append(torch.stack(cells, dim=-1))
    return torch.stack(positions, dim=1), out_sizes
