"""Layer inputs and pseudo-gradients of a sequential network, by walking it by hand.

Linear and convolution layers are evaluated as a W^T on explicit inputs, so that a and s are at hand without
hooks. A grouped convolution counts as one part per group. `moments` lists, with weights that sum to one,
everything the Kronecker methods are expectations of.
"""

from dataclasses import dataclass

import torch
from torch import nn

from tests.oracles.patches import patches

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Part:
    """One layer (or one group of a convolution): a (N, T, da), s (N, T, dg)."""

    layer: int
    a: torch.Tensor
    s: torch.Tensor


def with_one(a, module):
    if module.bias is None:
        return a
    return torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)


def matrix(module):
    W = module.weight.reshape(len(module.weight), -1)
    return W if module.bias is None else torch.cat([W, module.bias[:, None]], dim=1)


def walk(model, x):
    """Parts in order of the layers, and the output (N, D)."""
    parts, layer = [], 0
    for module in model:
        if isinstance(module, nn.Linear):
            a = with_one(x, module)
            s = a @ matrix(module).T
            parts.append(Part(layer, a.reshape(len(a), -1, a.shape[-1]), s))
            x, layer = s, layer + 1
        elif isinstance(module, CONVOLUTIONS):
            x = walk_convolution(module, x, layer, parts)
            layer += 1
        else:
            x = module(x)
    return parts, x.reshape(len(x), -1)


def walk_convolution(module, x, layer, parts):
    cells, sizes = patches(module, x)
    per_group = cells.shape[2] // module.groups
    rows = len(module.weight) // module.groups
    outs = []
    for group in range(module.groups):
        chosen = cells[:, :, group * per_group : (group + 1) * per_group]
        a = with_one(chosen.reshape(*chosen.shape[:2], -1), module)
        s = a @ matrix(module)[group * rows : (group + 1) * rows].T
        parts.append(Part(layer, a, s))
        outs.append(s)
    return torch.cat(outs, dim=-1).transpose(1, 2).reshape(len(x), -1, *sizes)


def layers_of(model):
    """(d_out, fan_in, bias) of each layer, as `order` wants them."""
    modules = [m for m in model if isinstance(m, (nn.Linear, *CONVOLUTIONS))]
    return [(len(m.weight), m.weight[0].numel(), m.bias is not None) for m in modules]


def moments(model, x, law, targets=None):
    """[(weight, [a_i (T, da)], [g_i (T, dg)])] over examples and labels; the weights sum to one."""
    found = []
    for n in range(len(x)):
        parts, z = walk(model, x[n : n + 1])
        labels = law.labels(z[0]) if targets is None else [(1.0, targets[n])]
        a = [part.a[0].detach().numpy() for part in parts]
        for weight, y in labels:
            gradients = torch.autograd.grad(law.log_density(z[0], y), [part.s for part in parts], retain_graph=True)
            g = [d.reshape(-1, d.shape[-1]).numpy() for d in gradients]
            found.append((weight / len(x), a, g))
    return found


def elementwise(modules, h):
    """Slopes of modules that act on each entry by itself, by autograd of their sum; None where they have parameters."""
    if any(isinstance(m, (nn.Flatten, nn.Softmax)) or list(m.parameters()) for m in modules):
        return None
    h = h.detach().clone().requires_grad_()
    out = nn.Sequential(*modules)(h.clone())
    return torch.autograd.grad(out.sum(), h)[0] if out.shape == h.shape else None


def passed_on(model, x):
    """{i: (slopes (N, d), W of the next)} of Linear layers on (N, d) that another follows by activations alone."""
    found, layer, last, between, h = {}, -1, None, [], None
    for module in model:
        before, x = x, module(x)
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            layer += 1
            linear = isinstance(module, nn.Linear) and before.dim() == 2
            if last is not None and linear and (slopes := elementwise(between, h)) is not None:
                found[last] = (slopes.numpy(), module.weight.detach().numpy().copy())
            last, between, h = (layer if linear else None), [], x
        else:
            between.append(module)
    return found


def part_layers(model, x):
    """The layer number of each part (one per layer unless convolutions are grouped)."""
    return [part.layer for part in walk(model, x[:1])[0]]
