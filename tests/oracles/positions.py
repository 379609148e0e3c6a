"""Fishers of networks with a softmax at every position, some of which are left out, by plain autograd.

Logits that are left out are removed from an example's output before anything is derived from it: nothing is masked.
"""

import torch


def columns(z):
    """Vectors (K, M, C) with Σ v vᵀ the output Fisher of M independent softmaxes z (M, C)."""
    roots = []
    for q in torch.softmax(z.detach(), -1):
        values, vectors = torch.linalg.eigh(torch.diag(q) - torch.outer(q, q))
        roots.append(vectors * values.clamp(min=0).sqrt())
    return torch.block_diag(*roots).T.reshape(-1, *z.shape)


def scores(z, labels):
    """Softmax minus one-hot, (1, M, C)."""
    return (torch.softmax(z, -1) - torch.nn.functional.one_hot(labels, z.shape[-1])).detach().unsqueeze(0)


def gradient(z, parameters, v):
    parts = torch.autograd.grad(z, parameters, v, retain_graph=True, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(parts, parameters, strict=True)]
    )


def rows(model, inputs, counted, labels=None, axis=-1):
    """Per example the gradients (K, P) of the columns, or of the labels' scores.

    Args:
        model: called with each example's inputs, a tuple of tensors that count examples.
        inputs: a list of such tuples of one example each.
        counted: a list of masks (positions...), one per example.
        labels: a list of labels (positions...); None: the exact kind.
        axis: of the classes in an example's output with its first dimension.
    """
    parameters = list(model.parameters())
    found = []
    for n, given in enumerate(inputs):
        z = model(*given).movedim(axis, -1)[0][counted[n]]
        vectors = columns(z) if labels is None else scores(z, labels[n][counted[n]])
        found.append(torch.stack([gradient(z, parameters, v) for v in vectors]))
    return found


def mean(found):
    """The mean over examples of Σ_k g gᵀ."""
    return sum(g.T @ g for g in found) / len(found)
