"""Types, layouts and devices of parameters and buffers, and the contexts that a user asks in."""

from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

from tests.trust.catalogue.parts import network
from tests.trust.catalogue.row import Row, drawn, normal

FLOAT64 = (torch.float64,)


class CastTo(nn.Module):
    """A head that is applied in another type than it is stored in."""

    def __init__(self, dtype):
        super().__init__()
        self.a, self.head, self.type = nn.Linear(3, 4), nn.Linear(4, 2), dtype

    def forward(self, x):
        h = torch.tanh(self.a(x)).to(self.type)
        return functional.linear(h, self.head.weight.to(self.type), self.head.bias.to(self.type))


class Autocast(nn.Module):
    """Half precision inside."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.head(torch.tanh(self.a(x))).float()


class Subclass(torch.Tensor):
    """A tensor of another type."""


class Scalars(nn.Module):
    """A parameter without dimensions, and one without entries."""

    def __init__(self):
        super().__init__()
        self.scale, self.empty, self.head = nn.Parameter(torch.randn(())), nn.Parameter(torch.zeros(0)), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.scale * x))


@contextmanager
def default_type(dtype):
    """Torch's default type for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    """Torch's deterministic algorithms for a while."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def changed(change):
    """The network after a change of its parameters or buffers."""

    def build():
        model = drawn(network)()
        change(model)
        return model

    return build


def _parameter(place, value):
    return lambda model: setattr(model[place], "weight", nn.Parameter(value()))


def _buffer(value):
    return lambda model: model.register_buffer("extra", value())


def _quantised():
    return torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)


def rows():
    """The rows of this kind."""
    x = lambda: normal(5, 3)  # noqa: E731
    weights = {
        "expanded": _parameter(3, lambda: normal(1, 4).expand(2, 4)),
        "transposed": _parameter(3, lambda: normal(4, 2).T),
        "with gaps": _parameter(0, lambda: normal(8, 6)[::2, ::2]),
        "of a tensor subclass": _parameter(0, lambda: normal(4, 3).as_subclass(Subclass)),
    }
    found = [Row(f"weight, {name}", changed(change), x, dtypes=FLOAT64) for name, change in weights.items()]
    buffers = {
        "on the meta device": lambda: torch.empty(3, device="meta"),
        "complex": lambda: torch.zeros(3, dtype=torch.complex128),
        "sparse": lambda: torch.eye(3).to_sparse(),
        "sparse in rows": lambda: torch.eye(3).to_sparse_csr(),
        "quantised": _quantised,
        "expanded": lambda: torch.zeros(1).expand(4),
        "none": lambda: None,
    }
    found += [Row(f"buffer, {name}", changed(_buffer(value)), x, dtypes=FLOAT64) for name, value in buffers.items()]
    contexts = {
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "float16 as default type": lambda: default_type(torch.float16),
        "float64 as default type": lambda: default_type(torch.float64),
        "deterministic algorithms": deterministic,
        "one thread for backward": lambda: torch.autograd.set_multithreading_enabled(False),
        "tensors saved elsewhere": torch.autograd.graph.save_on_cpu,
    }
    found += [Row(f"asked under {name}", drawn(network), x, around=context) for name, context in contexts.items()]
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    found += [
        *[Row(f"all in {name}", drawn(network), x, dtypes=(dtype,), tolerance=0.1) for name, dtype in half.items()],
        Row("scalar and empty parameters", drawn(Scalars), x),
        Row("weights cast up in the forward", drawn(lambda: CastTo(torch.float64)), x),
        Row("weights cast down in the forward", drawn(lambda: CastTo(torch.float32)), x, tolerance=1e-5),
        Row("autocast inside", drawn(Autocast), x, dtypes=(torch.float32,), tolerance=0.1,
            oracle=drawn(lambda: CastTo(torch.float64))),
        Row("layers of two types", changed(lambda model: model[3].float()), x, "have several types", dtypes=(None,)),
        Row("all on the meta device", changed(lambda model: model.to("meta")), x, "on the meta device", dtypes=FLOAT64),
        Row("complex parameters", changed(lambda model: model.to(torch.complex128)), x, "is complex", dtypes=(None,)),
    ]  # fmt: skip
    return found
