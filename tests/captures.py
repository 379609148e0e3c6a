"""Captures of random numbers, of every kind, and their per-example gradients by the products that define them."""

import torch

from fisherviz.capture.captures import Capture, GenericCapture, TiedCapture
from fisherviz.capture.tokens import TokenCapture

N = 1100
"""More than two of the least tiles of examples (512), and no multiple of them."""


def capture(examples=N, vectors=2, positions=1, groups=1, da=4, dg=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (positions,) if groups == 1 else (positions, groups)
    a = torch.randn(examples, *shape, da, generator=generator, dtype=torch.float64)
    return Capture(a, torch.randn(vectors, examples, *shape, dg, generator=generator, dtype=torch.float64))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(seed=0, examples=30, vectors=3, positions=4, d=3, vocabulary=7):
    """Positions of padding read nothing, some rows of the table are read twice and some never."""
    read = torch.randint(vocabulary - 2, (examples, positions), generator=torch.Generator().manual_seed(seed))
    weights = normal(examples, positions, seed=seed + 1) * (read != 1)
    return TokenCapture(read, weights, normal(vectors, examples, positions, d, seed=seed + 2), vocabulary)


def tied(transposed, seed=0, examples=30, vectors=3):
    read = tokens(seed, examples, vectors)
    used = Capture(normal(examples, 2, 3, seed=seed + 3), normal(vectors, examples, 2, 7, seed=seed + 4))
    return TiedCapture(read, used, transposed)


def written_out(made):
    """Per-example gradients (K N, P) in unit order, by the outer products that define them."""
    if isinstance(made, GenericCapture):
        return made.gradients.flatten(0, 1)
    if isinstance(made, TokenCapture):
        one_hot = torch.nn.functional.one_hot(made.tokens, made.vocabulary) * made.weights.unsqueeze(2)
        return torch.einsum("ntv,kntd->kndv", one_hot, made.g).flatten(2).flatten(0, 1)
    if isinstance(made, TiedCapture):
        read = written_out(made.read).unflatten(1, (-1, made.read.vocabulary))
        used = written_out(made.used).unflatten(1, (made.read.vocabulary, -1))
        return (read + used.mT if made.transposed else read.mT + used).flatten(1)
    a, g = made.a, made.g
    if a.dim() == 4:
        return torch.einsum("ntci,kntco->kncoi", a, g).flatten(2).flatten(0, 1)
    return torch.einsum("nti,knto->knoi", a, g).flatten(2).flatten(0, 1)
