"""Modules that make it hard to count every parameter once: shared, tied, side-stepped, frozen, hooked, one's own."""

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint


def images(*size, N=3):
    return torch.randn(N, *size, dtype=torch.float64)


class Recurring(nn.Module):
    """One Linear used twice, the second time on its own output."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.again(torch.tanh(self.again(torch.tanh(self.first(x)))))))


class TwoScales(nn.Module):
    """One convolution used on two image sizes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2)

    def forward(self, x):
        return self.conv(x).flatten(2).mean(2) + torch.tanh(self.conv(x[..., ::2, ::2])).flatten(2).sum(2)


class Residual(nn.Module):
    """Additions in place on what a layer gave, and an activation in place after a layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = self.inner(x)
        h += x
        h = torch.sigmoid(h)
        s = self.outer(h)
        s += h
        return self.last(functional.relu(s, inplace=True))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Bare(nn.Module):
    """Parameters of the root itself, beside a layer."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(2, 1))
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x * self.scale) + self.shift[:, 0] * x.sum(1, keepdim=True)


class Tied(nn.Module):
    """A decoder that is the encoder transposed, and two modules that share one weight."""

    def __init__(self):
        super().__init__()
        self.encode, self.mix, self.same = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.same.weight = self.mix.weight

    def forward(self, x):
        h = torch.tanh(self.encode(x))
        return self.same(torch.tanh(self.mix(h))) @ self.encode.weight


class TiedEmbedding(nn.Module):
    """A language model's habit: the output layer's weight is the embedding's."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(torch.tanh(self.embed(tokens).mean(1)))


class Cubic(nn.Module):
    """A module of one's own, with its own formula."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, 3))

    def forward(self, x):
        return (x @ self.w.T) ** 3 + self.w.sum(1)


class Doubled(nn.Linear):
    """Looks like a Linear and isn't one."""

    def forward(self, x):
        return 2 * super().forward(x) + x.sum(-1, keepdim=True) * self.bias


class TokensFirst(nn.Module):
    """The token axis leads inside: a layer's first axis is not the examples'."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))


class Merged(nn.Module):
    """Examples and tokens merged into one axis for a layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        N, T, _ = x.shape
        return self.last(torch.tanh(self.inner(x.reshape(N * T, 3))).reshape(N, T, 4).mean(1))


class SideDoor(nn.Module):
    """A Linear that is called and whose weight is also used directly."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return functional.linear(torch.tanh(self.layer(x)), self.layer.weight)


class OnlySideDoor(nn.Module):
    """A Linear that is never called, only its weight used."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(torch.tanh(functional.linear(x, self.layer.weight, self.layer.bias)))


class Unused(nn.Module):
    """A layer that the output does not depend on."""

    def __init__(self):
        super().__init__()
        self.idle, self.layer = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x)


class Discarded(nn.Module):
    """A layer that runs and whose result goes nowhere."""

    def __init__(self):
        super().__init__()
        self.layer, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        self.idle(x)
        return self.layer(x)


class PartlyFrozenByNoGrad(nn.Module):
    """Features computed without gradients: their parameters have none."""

    def __init__(self):
        super().__init__()
        self.features, self.last = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x):
        with torch.no_grad():
            h = torch.tanh(self.features(x))
        return self.last(h)


class Keyword(nn.Module):
    """A Linear called by keyword."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(input=x)


class Unsqueezed(nn.Module):
    """A layer that sees each example alone, without a batch axis."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return torch.stack([self.layer(row) for row in x])


class LastToken(nn.Module):
    """A sequence model read off at its last position."""

    def __init__(self, sequence_model, last):
        super().__init__()
        self.model, self.last = sequence_model, last

    def forward(self, x):
        out = self.model(x)
        return self.last((out[0] if isinstance(out, tuple) else out)[:, -1])


class Checkpointed(nn.Module):
    """A layer that is run a second time during the backward pass."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(checkpoint(lambda h: torch.tanh(self.inner(h)), x, use_reentrant=False))


class Experts(nn.Module):
    """A layer sees only the examples that are sent to it; the first two go the same way."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        first = x[:, 0] > 0
        h = torch.zeros(len(x), 3, dtype=x.dtype)
        h = h.index_put((first,), self.one(x[first])).index_put((~first,), self.two(x[~first]))
        return self.last(torch.tanh(h))


def sent_to_experts():
    """Three of six examples to each expert."""
    x = images(3, N=6)
    x[:, 0] = x[:, 0].abs() * torch.tensor([1, 1, -1, 1, -1, -1])
    return x


class Siamese(nn.Module):
    """A layer that sees two versions of every example in one batch of 2 N."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x):
        both = torch.tanh(self.inner(torch.cat([x, x.flip(1)])))
        return self.last(both[: len(x)] * both[len(x) :])


class Square(torch.autograd.Function):
    """A function of one's own, with a derivative backwards only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Squaring(nn.Module):
    def forward(self, x):
        return Square.apply(x)


class Squeezed(nn.Module):
    """The habit of squeezing one output away, which for a single example leaves a scalar."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 1))

    def forward(self, x):
        return self.net(x).squeeze()


class Detached(nn.Module):
    """A path whose gradient is stopped beside one that goes on."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        return self.last(h) + h.detach()[:, :2]


def with_hook(kind):
    """A user's own hook that changes what the layer gives or gets."""

    def build():
        net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
        if kind == "before":
            net[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
        else:
            net[0].register_forward_hook(lambda module, args, out: 2 * out)
        return net

    return build


def pruned():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    prune.random_unstructured(net[0], "weight", 0.3)
    return net


class SelfBilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.form = nn.Bilinear(3, 3, 2)

    def forward(self, x):
        return self.form(x, x)
