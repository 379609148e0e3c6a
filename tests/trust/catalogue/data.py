"""What data come as, and what inputs may be."""

import collections

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests.trust.catalogue.parts import TwoInputs, network
from tests.trust.catalogue.row import Row, drawn, normal

FLOAT64 = (torch.float64,)


class Stream(IterableDataset):
    """Seven examples, shared among workers."""

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        for n, x in enumerate(normal(7, 3)):
            if worker is None or n % worker.num_workers == worker.id:
                yield x, n % 2


class Once:
    """Gives its batches the first time."""

    def __init__(self):
        self.left = True

    def __iter__(self):
        if self.left:
            self.left = False
            yield from normal(6, 3).split(2)


class Mapping(collections.UserDict):
    """A mapping that is no dict, such as a BatchEncoding."""


class Subclass(torch.Tensor):
    """A tensor of another type."""


class Memory(nn.Module):
    """A second input that belongs to no example."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, memory):
        return self.head(torch.tanh(self.a(x)) @ (memory.T @ memory))


class Masked(nn.Module):
    """Attention under a mask (T, T)."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, mask):
        h = self.a(x)
        return self.head(torch.tanh(torch.softmax(h @ h.transpose(1, 2) + mask, -1) @ h).mean(1))


class OfItsType(nn.Module):
    """Takes numbers of any type."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, x):
        return self.a(x.to(self.a.weight.dtype) / 8)


def _seven(_):
    return [((x.unsqueeze(0),), {}) for x in normal(7, 3)]


def _six(_):
    return [((x.unsqueeze(0),), {}) for x in normal(6, 3)]


def _loader(data=None, **options):
    return lambda: DataLoader(data or TensorDataset(normal(7, 3), torch.zeros(7).long()), batch_size=3, **options)


def rows():
    """The rows of this kind."""
    build, two = drawn(network), drawn(TwoInputs)
    x, w = normal(5, 3), normal(5, 2, seed=4)
    pairs = lambda _: [((x[n : n + 1], w[n : n + 1]), {}) for n in range(5)]  # noqa: E731
    scaled = lambda _: [(args, {"scale": 2.0}) for args, _ in pairs(0)]  # noqa: E731
    zeros = torch.zeros(5).long()
    own = torch.Generator().manual_seed(1)
    whole = torch.randint(8, (5, 3), generator=own)
    mask, tokens = normal(4, 4, seed=4), normal(4, 4, 3)
    with_mask = lambda _: [((tokens[n : n + 1], mask), {}) for n in range(4)]  # noqa: E731
    loaders = {
        "a loader": _loader(), "a loader with workers": _loader(num_workers=2),
        "an iterable data set": _loader(Stream()),
        "an iterable data set with workers": _loader(Stream(), num_workers=2),
    }  # fmt: skip
    found = [Row(name, build, make, examples=_seven, dtypes=FLOAT64) for name, make in loaders.items()]
    found += [
        Row("a loader that shuffles by the global generator", build, _loader(shuffle=True), examples=_seven,
            dtypes=FLOAT64),
        Row("batches shuffled between passes", build, lambda: Shuffled(), "other examples than the first one",
            between=lambda model: None, dtypes=FLOAT64),
        Row("batches given once", build, Once, "empty|iterated again", between=lambda model: None, dtypes=FLOAT64),
        Row("a generator", build, lambda: iter(normal(6, 3).split(2)), "one-shot iterator", dtypes=FLOAT64),
        Row("arrays of numpy", build, lambda: [normal(6, 3).numpy()], "must be tensors, got ndarray", dtypes=FLOAT64),
        Row("uneven batches", build, lambda: [normal(4, 3), normal(1, 3, seed=3), normal(3, 3, seed=4)]),
        Row("one example", build, lambda: normal(1, 3)),
        Row("no example", build, lambda: normal(0, 3), "a batch is empty"),
        Row("whole numbers", drawn(OfItsType), lambda: whole), Row("bytes", drawn(OfItsType), lambda: whole.byte()),
        Row("truth values", drawn(OfItsType), lambda: whole > 3),
        Row("float32 for a float64 model", build, lambda: normal(5, 3).float(), "parameters are float64",
            dtypes=(None,)),
        Row("NaN", build, lambda: normal(5, 3) / (normal(5, 3) == normal(5, 3)[3, 1]).logical_not(), "NaN or infinite"),
        Row("sparse", build, lambda: normal(5, 3).to_sparse(), "dense and real"),
        Row("complex", build, lambda: normal(5, 3) * 1j, "dense and real", dtypes=FLOAT64),
        Row("not contiguous", build, lambda: normal(3, 6).T), Row("expanded", build, lambda: normal(1, 3).expand(6, 3)),
        Row("a tensor subclass", build, lambda: normal(5, 3).as_subclass(Subclass), dtypes=FLOAT64),
        Row("a parameter", build, lambda: nn.Parameter(normal(5, 3))),
        Row("two inputs", two, lambda: ((x, w), zeros), examples=pairs),
        Row("a dictionary", two, lambda: {"x": x, "w": w}, examples=pairs),
        Row("a dictionary in another order", two, lambda: {"w": w, "x": x}, examples=pairs),
        Row("a mapping that is no dict", two, lambda: [Mapping(x=x, w=w)], examples=pairs, dtypes=FLOAT64),
        Row("a dictionary with a number", two, lambda: {"x": x, "w": w, "scale": 2.0}, examples=scaled),
        Row("a dictionary with a tensor of no dimension", two,
            lambda: {"x": x, "w": w, "scale": torch.tensor(2.0).double()}, examples=scaled),
        Row("a dictionary with None", two, lambda: {"x": x, "w": None},
            examples=lambda _: [((x[n : n + 1],), {}) for n in range(5)]),
        Row("labels in the dictionary", two, lambda: [{"x": x, "labels": zeros}], "pass targets='labels'"),
        Row("a memory of another length than the batch", drawn(Memory),
            lambda: [((x, normal(7, 4, seed=4)), zeros)],
            examples=lambda _: [((x[n : n + 1], normal(7, 4, seed=4)), {}) for n in range(5)]),
        Row("a memory of as many rows as examples", drawn(Memory), lambda: [((x, normal(5, 4, seed=4)), zeros)],
            "changes with the other examples|belongs to no example"),
        Row("a mask of as many rows as examples", drawn(Masked), lambda: [((tokens, mask), zeros[:4])],
            "belongs to no example", examples=with_mask),
    ]  # fmt: skip
    return found


class Shuffled:
    """Batches in another order at every pass."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        yield from normal(6, 3).roll(self.passes, 0).split(2)
