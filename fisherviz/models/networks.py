"""The networks of the four papers and their initialisations.

`build(name, seed=...)` is deterministic and leaves the global random state alone; layers have names that read
well in tables. Sizes that a paper does not give are chosen here and said in the docstring of the network.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn

from fisherviz.datasets.catalogue import Dataset
from fisherviz.support import choices

M = TypeVar("M", bound=nn.Module)

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "logistic": nn.Sigmoid}
AUTOENCODERS: dict[str, tuple[int, ...]] = {
    "mnist": (784, 1000, 500, 250, 30),
    "curves": (784, 400, 200, 100, 50, 25, 6),
    "faces": (625, 2000, 1000, 500, 30),
}


class Images(nn.Module):
    """Give vectors the shape of images, so that a convolutional network takes both.

    Args:
        shape: (channels, height, width) of one image.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Reshape (N, C·H·W) or (N, C, H, W) to (N, C, H, W)."""
        return x.reshape(-1, *self.shape)

    def extra_repr(self) -> str:
        """The shape, for the printed network."""
        return str(self.shape)


def kfac_mlp(
    inputs: int = 256,
    outputs: int = 10,
    *,
    hidden: Sequence[int] = (20,) * 5,
    activation: str = "tanh",
    init: str = "xavier",
    generator: Generator | None = None,
) -> nn.Sequential:
    """The classifier of Martens & Grosse 2015, figures 2 to 6: 256-20-20-20-20-20-10, tanh.

    Args:
        inputs: 256 for 16 × 16 images.
        outputs: number of logits.
        hidden: widths of the hidden layers.
        activation: "tanh", "relu" or "logistic".
        init: "xavier" (Glorot & Bengio 2010, uniform, zero biases) or "sparse" (`sparse_init`, as in
            section 13); the paper does not say which one these figures used.
        generator: where the weights come from; None: one seeded from `torch.initial_seed()`.

    Returns:
        A network with layers `layer1` to `layer6`.
    """
    choices.one_of("init", init, ("xavier", "sparse"))
    model = _mlp((inputs, *hidden, outputs), activation)
    if init == "sparse":
        return sparse_init(model, generator=generator)
    return _fill(model, nn.init.xavier_uniform_, generator)


def foof_mlp(
    inputs: int = 784,
    outputs: int = 10,
    *,
    hidden: Sequence[int] = (1000,) * 3,
    bias: bool = False,
    generator: Generator | None = None,
) -> nn.Sequential:
    """The classifier of Benzing 2021: 784-1000-1000-1000-10, ReLU, no biases, Kaiming initialisation.

    Args:
        inputs: 784 for 28 × 28 images.
        outputs: number of logits.
        hidden: widths of the hidden layers.
        bias: whether layers have biases (zero at first); the author's code has none.
        generator: where the weights come from; None: one seeded from `torch.initial_seed()`.

    Returns:
        A network with layers `layer1` to `layer4`.
    """
    return _fill(_mlp((inputs, *hidden, outputs), "relu", bias=bias), _he, generator)


def cwngd_convnet(
    shape: Sequence[int] = (1, 28, 28),
    outputs: int = 10,
    *,
    channels: int = 8,
    kernel: int = 5,
    stride: int = 2,
    pool: int = 3,
    hidden: int = 64,
    generator: Generator | None = None,
) -> nn.Sequential:
    """The classifier of Sang et al. 2022: convolution, max-pooling, two dense layers, ReLU, He init.

    The paper's sizes are in a picture that is not at hand. Chosen here: 8 channels of 5 × 5 with stride 2,
    pooling 3 × 3, so that 28 × 28 images give 8 × 4 × 4 = 128 features, then 128-64-10: 9,114 parameters.

    Args:
        shape: (channels, height, width) of the images; inputs may be flat or shaped.
        outputs: number of logits.
        channels: output channels of the convolution.
        kernel: side of the convolution's kernel.
        stride: stride of the convolution.
        pool: side and stride of the pooling window.
        hidden: width of the first dense layer.
        generator: where the weights come from; None: one seeded from `torch.initial_seed()`.

    Returns:
        A network with layers `conv`, `dense1` and `dense2`.

    Raises:
        ValueError: the image is too small for kernel and pooling.
    """
    sides = [((side - kernel) // stride + 1) // pool for side in shape[1:]]
    if min(sides) < 1:
        raise ValueError(
            f"Images of shape {tuple(shape)} leave nothing after a {kernel} x {kernel} kernel with "
            f"stride {stride} and pooling by {pool}; choose smaller ones."
        )
    features = channels * math.prod(sides)
    model = nn.Sequential(
        OrderedDict(
            images=Images(shape),
            conv=nn.utils.skip_init(nn.Conv2d, shape[0], channels, kernel, stride=stride),
            relu1=nn.ReLU(),
            pool=nn.MaxPool2d(pool),
            flat=nn.Flatten(),
            dense1=nn.utils.skip_init(nn.Linear, features, hidden),
            relu2=nn.ReLU(),
            dense2=nn.utils.skip_init(nn.Linear, hidden, outputs),
        )
    )
    return _fill(model, _he, generator)


def shrestha_mlp(
    inputs: int,
    outputs: int,
    *,
    hidden: Sequence[int] = (4,),
    activation: str = "relu",
    generator: Generator | None = None,
) -> nn.Sequential:
    """The small networks of Shrestha 2023: hidden layers (4,), (32, 16) or (32, 16, 16), He initialisation.

    Args:
        inputs: number of columns of the table.
        outputs: 1 for a regression, otherwise the number of logits.
        hidden: widths of the hidden layers.
        activation: "relu", "tanh" or "logistic"; the paper does not say which.
        generator: where the weights come from; None: one seeded from `torch.initial_seed()`.

    Returns:
        A network with layers `layer1`, `layer2`, ...
    """
    return _fill(_mlp((inputs, *hidden, outputs), activation), _he, generator)


def autoencoder(name: str = "mnist", *, nonzero: int = 15, generator: Generator | None = None) -> nn.Sequential:
    """The deep autoencoders of Hinton & Salakhutdinov 2006 as in Martens & Grosse 2015, section 13.

    Logistic units, a linear code, a mirrored decoder. The output is linear: Bernoulli logits for mnist and
    curves, means for faces.

    Args:
        name: "mnist" (784-1000-500-250-30), "curves" (784-400-200-100-50-25-6) or "faces"
            (625-2000-1000-500-30).
        nonzero: non-zero incoming weights of each unit (`sparse_init`).
        generator: where the weights come from; None: one seeded from `torch.initial_seed()`.

    Returns:
        A network with layers `encoder1`, ..., `code`, `decoder1`, ..., `output`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in AUTOENCODERS:
        raise ValueError(choices.unknown("autoencoder", name, AUTOENCODERS))
    sizes = AUTOENCODERS[name]
    depth = len(sizes) - 1
    encoder = [f"encoder{index}" for index in range(1, depth)]
    decoder = [f"decoder{index}" for index in range(1, depth)]
    model = _mlp((*sizes, *sizes[-2::-1]), "logistic", names=[*encoder, "code", *decoder, "output"], linear=("code",))
    return sparse_init(model, nonzero=nonzero, generator=generator)


def sparse_init(model: M, *, nonzero: int = 15, scale: float = 1.0, generator: Generator | None = None) -> M:
    """Initialise sparsely: every unit gets a few Gaussian incoming weights, the rest and the biases are zero.

    Martens 2010, section 5. Linear and convolutional layers are initialised in place, others left alone.

    Args:
        model: the network.
        nonzero: non-zero incoming weights of each unit (all, where there are fewer).
        scale: standard deviation of these weights.
        generator: where the weights come from; None: one seeded from `torch.initial_seed()`.

    Returns:
        The same network.

    Raises:
        ValueError: `nonzero` is less than one.
    """
    if nonzero < 1:
        raise ValueError(f"nonzero={nonzero} leaves units without inputs; choose at least 1.")

    def fill(weight: Tensor, generator: Generator) -> None:
        rows = weight.view(weight.shape[0], -1)
        count = min(nonzero, rows.shape[1])
        chosen = torch.rand(rows.shape, generator=generator, device="cpu").topk(count, dim=1).indices
        values = torch.randn(rows.shape[0], count, generator=generator, device="cpu") * scale
        rows.zero_().scatter_(1, chosen.to(rows.device), values.to(rows))

    return _fill(model, fill, generator)


_TABLE: dict[str, Callable[..., nn.Sequential]] = {
    "kfac-mlp": kfac_mlp,
    "foof-mlp": foof_mlp,
    "cwngd-convnet": cwngd_convnet,
    "shrestha-mlp": shrestha_mlp,
    **{f"{name}-autoencoder": partial(autoencoder, name) for name in AUTOENCODERS},
}


def names() -> tuple[str, ...]:
    """The names that `build` knows."""
    return tuple(_TABLE)


def build(name: str, *, seed: int = 0, dataset: Dataset | None = None, **options: Any) -> nn.Sequential:
    """Build one of the papers' networks.

    Args:
        name: one of `names()`.
        seed: decides the weights; the global random state is neither read nor changed.
        dataset: gives the numbers of inputs and outputs, or the shape of images, where `options` don't.
        **options: of the function of the same name in this module.

    Returns:
        The network, in training mode, in torch's default floating-point type.

    Raises:
        ValueError: an unknown name, or a data set that does not fit a network of fixed size.
        TypeError: an option that the network does not have, or a missing one.

    Example:
        >>> from fisherviz import models
        >>> sum(p.numel() for p in models.build("kfac-mlp").parameters())
        7030
    """
    if name not in _TABLE:
        raise ValueError(choices.unknown("model", name, _TABLE))
    parameters = inspect.signature(_TABLE[name]).parameters
    known = set(parameters) - {"generator"}
    unknown = sorted(set(options) - known)
    if unknown:
        near = choices.did_you_mean(unknown[0], sorted(known))
        raise TypeError(f"The model {name!r} has no option {unknown[0]!r}; it takes {', '.join(sorted(known))}{near}")
    if dataset is not None:
        found = {"inputs": dataset.inputs, "outputs": dataset.outputs, "shape": dataset.shape}
        options = {key: value for key, value in found.items() if key in known} | options
    missing = [key for key, one in parameters.items() if one.default is one.empty and key not in options]
    if missing:
        raise TypeError(f"The model {name!r} needs {' and '.join(missing)}; give them or dataset=.")
    model = _TABLE[name](generator=Generator().manual_seed(seed), **options)
    if dataset is not None and name.endswith("-autoencoder"):
        width = AUTOENCODERS[name.removesuffix("-autoencoder")][0]
        if dataset.inputs != width or dataset.outputs != width:
            raise ValueError(
                f"The model {name!r} maps {width} numbers to {width}, but {dataset!r} has {dataset.inputs} "
                f"inputs and {dataset.outputs} outputs; load it with another size or task."
            )
    return model


def _mlp(
    sizes: Sequence[int],
    activation: str,
    bias: bool = True,
    names: Sequence[str] | None = None,
    linear: Sequence[str] = (),
) -> nn.Sequential:
    """Linear layers with an activation after each but the last and those in `linear`; weights not yet set."""
    choices.one_of("activation", activation, ACTIVATIONS)
    names = names or [f"layer{index}" for index in range(1, len(sizes))]
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for name, fan_in, fan_out in zip(names, sizes[:-1], sizes[1:], strict=True):
        modules[name] = nn.utils.skip_init(nn.Linear, fan_in, fan_out, bias=bias)
        if name != names[-1] and name not in linear:
            modules[f"{name}_{activation}"] = ACTIVATIONS[activation]()
    return nn.Sequential(modules)


_he = partial(nn.init.kaiming_normal_, nonlinearity="relu")


def _fill(model: M, fill: Callable[..., object], generator: Generator | None) -> M:
    """Set the weights of linear and convolutional layers by `fill` from the generator, their biases to zero."""
    generator = Generator().manual_seed(torch.initial_seed()) if generator is None else generator
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                fill(module.weight, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
    return model
