"""What models return."""

import collections
import dataclasses

import torch
from torch import nn

from tests.oracles import laws
from tests.trust.catalogue.parts import Recipe
from tests.trust.catalogue.row import Row, drawn, normal

Named = collections.namedtuple("Named", "logits extra")


@dataclasses.dataclass
class Record:
    """A dataclass, as Hugging Face's outputs are."""

    logits: torch.Tensor
    loss: float = 0.0


class Attributes(collections.OrderedDict):
    """A dictionary with attributes."""

    def __getattr__(self, key):
        return self[key]


def rows():
    """The rows of this kind."""
    x = lambda: normal(5, 3)  # noqa: E731
    build = lambda change: drawn(lambda: Recipe(change))  # noqa: E731
    forms = {
        "a dictionary": (lambda z: {"logits": z}, lambda out: out["logits"]),
        "a tuple": (lambda z: (z, 1), lambda out: out[0]),
        "a dataclass": (Record, lambda out: out.logits),
        "a named tuple": (lambda z: Named(z, z), lambda out: out.logits),
        "a dictionary with attributes": (lambda z: Attributes(logits=z), lambda out: out.logits),
    }
    found = [Row(f"{name}, picked", build(form), x, output=pick) for name, (form, pick) in forms.items()]
    found += [Row(f"{name}, not picked", build(form), x, "pick the output with") for name, (form, _) in forms.items()]
    bad = {
        "half of the examples": (lambda z: z[::2], "its first dimension must count them"),
        "examples in another order": (lambda z: z.flip(0), "changes with the other examples"),
        "classes, no logits": (lambda z: z.argmax(1), "needs outputs \\(N, C\\)"),
        "detached": (lambda z: z.detach(), "does not depend on the probed parameters"),
        "an array": (lambda z: z.detach().numpy(), "returned ndarray"),
        "an infinite logit": (lambda z: torch.cat([z, torch.full_like(z[:, :1], -torch.inf)], 1), "NaN or infinite"),
        "complex": (lambda z: torch.complex(z, z), "complex"),
        "a scalar": (lambda z: z.sum(), "its first dimension must count them"),
    }
    found += [Row(name, build(change), x, said) for name, (change, said) in bad.items()]
    good = {
        "not contiguous": lambda z: z.T.contiguous().T,
        "expanded": lambda z: z[:, :1].expand(-1, 3),
        "a constant column": lambda z: torch.cat([z, torch.zeros_like(z[:, :1])], 1),
        "double": lambda z: z.double(),
        "saturated": lambda z: 200 * z,
    }
    found += [Row(name, build(change), x) for name, change in good.items()]
    found += [
        Row("float32 of a float64 model", build(lambda z: z.float()), x, tolerance=1e-6),
        Row("float16", build(lambda z: z.half()), x, tolerance=1e-2),
        Row("one column", build(lambda z: z[:, :1]), x, law=laws.Bernoulli()),
        Row("no column", build(lambda z: z[:, 0]), x, law=laws.Bernoulli()),
        Row("tiny", build(lambda z: 1e-12 * z), x, law=laws.Gaussian()),
        Row("large", build(lambda z: 1e3 * z), x, law=laws.Gaussian()),
        Row(
            "positions",
            drawn(lambda: nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2)))),
            x,
            law=PerPosition(),
            likelihood="categorical",
        ),
    ]
    return found


class PerPosition:
    """A class for each of two positions, classes last."""

    def log_density(self, z, y):
        one = laws.Categorical()
        return one.log_density(z[:2], y[0]) + one.log_density(z[2:], y[1])

    def labels(self, z):
        one = laws.Categorical()
        return [(p * q, (a, b)) for p, a in one.labels(z[:2]) for q, b in one.labels(z[2:])]
