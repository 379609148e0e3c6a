"""Sang et al. 2022, figures 1 to 3: a layer's Fisher and its components, of dense and of convolutional layers.

The paper draws them of sample networks as diagrams; here they are those of trained networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fisherviz import plotting
from fisherviz.approximations import approximate
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.sang.components import GAMMA, METHODS, SCALES, fisher, leak, measured, medians, network, problem
from fisherviz.papers.trials.problems import Problem
from fisherviz.papers.trials.words import spread
from fisherviz.papers.trials.work import Run, kept
from fisherviz.plotting.style import DIVERGING
from fisherviz.probe import Probe

INDEPENDENT = 0.1
"""Share of a squared norm between units up to which they count as independent."""
ZERO = 0.01
"""What counts as a mean gradient of zero: its squared norm, to the mean of squared norms."""
SINGLE = 1 / torch.finfo(torch.float32).eps
"""Condition number from which on a matrix has no inverse in float32, which TensorFlow computes in."""
BRIGHT = 0.99  # share of the cells of F below the top of its scale
SMALL, WIDE = 10, {"smoke": 20, "desk": 50, "paper": 50}
"""Hidden units of the dense network that is drawn, and of a wider one that is measured beside it."""
FAN_IN, UNITS, SIDE = 128, 256, 8
"""Figure 2's sample layer: input channels, output channels, side of its filters."""
Networks = list[dict[str, Any]]


def _dense(run: Run, width: int) -> Problem:
    return problem(run, "shrestha-mlp", (("hidden", (width, width)),), size=8)


def _convolution(run: Run) -> Problem:
    return problem(run, "cwngd-convnet")


def _departures(of: Problem) -> tuple[str, ...]:
    """The claims are of networks in general: what is trained matters, its sizes are an example."""
    found = ["digits instead of MNIST"] if of.dataset == "digits" else []
    return tuple([*found, f"the first {of.limit:,} images"] if of.limit else found)


def _seeds(run: Run) -> range:
    return range(run.seed + 1, run.seed + 1 + SCALES[run.scale].seeds)


def _measured(problems: Sequence[Problem], run: Run) -> list[Networks]:
    """What is measured of the networks of each problem, a seed at a time."""
    seeds = _seeds(run)
    found = run.map(_one, [(of, seed) for of in problems for seed in seeds])
    return [found[start : start + len(seeds)] for start in range(0, len(found), len(seeds))]


def _one(item: tuple[Problem, int], run: Run) -> dict[str, Any]:
    return measured(item[0], run, item[1])


@exhibit(
    "sang.fig1", "figure 1: the full, layer-wise and component-wise Fisher of a dense network",
    shows="the full Fisher of a dense network, its diagonal blocks of layers, and CW-NGD's blocks of output units",
    desk=0.01, paper=0.7,
)  # fmt: skip
def fig1(run: Run) -> Outcome:
    """Draw the Fisher of a trained dense network and what layer-wise, component-wise and entry-wise methods keep.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    small, wide = _dense(run, SMALL), _dense(run, WIDE[run.scale])
    found, wider = _measured((small, wide), run)
    departures = _departures(small)
    other = f"; with hidden layers of {WIDE[run.scale]}: {{}}"
    claims = (
        _independent_covariance(found, departures, other.format(_by_layer(wider, "empirical", "covariance"))),
        _independent(found, departures, other.format(_by_layer(wider, "empirical", "off_unit"))),
        _zero_mean(found, departures, other.format(_by_layer(wider, "empirical", "mean", ".2g"))),
        _more_precise(found, departures, other.format(_beside(wider, "empirical"))),
    )
    caption = (
        "Above the empirical Fisher (eq. 1, which the paper takes), below the exact one (eq. 3), in unit order with "
        "each unit's bias last: all of it, the blocks of layers, CW-NGD's blocks of output units, and the diagonal. "
        f"|entries| on a linear scale from 0 to the {BRIGHT:.0%} quantile of the left image; above each image the "
        "share of ‖F‖² that it keeps."
    )
    details = _details(small, found, run, "64-10-10-10 (He's initialisation, ReLU), images scaled to 8 × 8")
    setting = f"{small.title} 8 × 8, 64-10-10-10, {len(found)} seeds"
    return Outcome(claims, setting, details, caption, draw(9.6, 5.1, lambda f: _four(f, small, run), heatmaps=True))


@exhibit(
    "sang.fig2", "figure 2: a convolutional layer's weights in groups of one output channel",
    shows="a convolution with 8 × 8 filters from 128 to 256 channels, whose weights are 256 blocks of 8,192 numbers",
    desk=0.0, paper=0.0,
)  # fmt: skip
def fig2(run: Run) -> Outcome:
    """Draw the weights of a trained convolution, group by group, between its input and its outputs.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    of = _convolution(run)
    epochs, seed = SCALES[run.scale].epochs, run.seed + 1
    model = network(of, epochs, seed, run.device)
    images = of.data().train.inputs[:64].to(run.device, torch.float64)
    layer = model.get_submodule("conv")
    assert isinstance(layer, nn.Conv2d)
    shown = images.reshape(len(images), 1, 28, 28)

    def measure() -> dict[str, Any]:
        noise = torch.randn(shown.shape, dtype=shown.dtype, generator=torch.Generator().manual_seed(seed)).to(shown)
        found = {
            name: leak(layer, x, layer.out_channels) for name, x in (("images", shown), ("noise", noise.to(shown)))
        }
        return {name: {"largest": largest, "nodes": nodes} for name, (largest, nodes) in found.items()}

    found = kept({"leak": asdict(of), "epochs": epochs, "seed": seed, "device": run.device}, measure, run)
    largest = max(found[name]["largest"] for name in ("images", "noise"))
    nodes, seen = found["noise"]["nodes"], found["images"]["nodes"]
    (sample,) = Probe(nn.Sequential(nn.Conv2d(FAN_IN, UNITS, SIDE), nn.Flatten()), "gaussian").layers
    inside = sample.num_parameters // sample.out_features
    outputs = layer(shown).shape[2:].numel()
    claims = (
        Claim(
            "the weight of the sample layer consists of 256 blocks of 8 × 8 × 128 = 8192 elements, and with the bias "
            "each block of F is (1 + k e c) × (1 + k e c) (section III-D)",
            "256 blocks of 8192, 8193 with the bias",
            f"{sample.out_features} components of {inside:,} parameters, biases included",
            "as many components of as many parameters",
            (sample.out_features, inside) == (UNITS, SIDE * SIDE * FAN_IN + 1),
            values={"components": float(sample.out_features), "parameters": float(inside)},
        ),
        Claim(
            "elements belonging to different groups contribute to different output nodes (section III-D)",
            "no number",
            f"of a trained layer, the largest |derivative| of a channel's outputs by another's weights is {largest:g}",
            "zero",
            largest == 0.0,
            values={"largest": largest},
        ),
        Claim(
            "the layer has W H c output nodes and many of them share the same weights, making unit-wise NGD impossible "
            "(section III-D)",
            "no number",
            f"{outputs * layer.out_channels:,} output nodes, {nodes} of which hang on one channel's weights",
            "the weights of a channel reach all of its W H nodes in an image of noise",
            nodes == outputs > 1,
            sensitivity=f"in one image of the data, whose borders are empty, at most {seen}",
            values={"nodes": float(nodes), "nodes_in_data": float(seen)},
            earlier_rule="the same in one of 64 images of the data",
            earlier_holds=seen == outputs > 1,
        ),
    )
    details = (
        f"the first layer of the network of figure 3 ({layer.out_channels} filters of 5 × 5 on {of.title}, trained by "
        f"{epochs} epochs of CW-NGD), seed {seed}; derivatives by forward mode on 64 images and on as many of noise; "
        "the paper's sample layer as this library divides it"
    )
    caption = (
        "An image, the trained filters, each of which is a component with its bias, and the channels that they give: "
        "one group of weights for each output channel."
    )
    setting = f"{of.title}, convolution 8 of 5 × 5"
    return Outcome(claims, setting, details, caption, draw(9.0, 2.5, lambda f: _groups(f, layer, shown[:1])))


@exhibit(
    "sang.fig3", "figure 3: the Fisher of a convolutional layer, its inverse, and their components",
    shows="the Fisher of a convolutional layer and its inverse as blocks of one output channel each",
    desk=0.02, paper=0.6,
)  # fmt: skip
def fig3(run: Run) -> Outcome:
    """Draw the Fisher of a trained convolution and its damped inverse beside those of its components.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    of = _convolution(run)
    (found,), departures = _measured((of,), run), _departures(of)
    claims = (
        _independent_covariance(found, departures),
        _independent(found, departures),
        _as_general(found, departures),
        _zero_mean(found, departures),
        _more_precise(found, departures),
        _invertible(found, departures, "condition", "F summed over the batch"),
        replace(_invertible(found, departures, "condition_mean_cost", "COST a mean"), repeats=True),
    )
    caption = (
        "The convolution's empirical Fisher, summed over one batch, above, and its inverse with the paper's γ = 1e-4 "
        "below: all of it, CW-NGD's components, and the absolute difference with its Frobenius norm to the left one's. "
        f"|entries| on linear scales from 0 to the {BRIGHT:.0%} quantile: the left image's above, each its own below."
    )
    sizes = "convolution 8 of 5 × 5, stride 2, max-pooling 3 × 3, dense 128-64-10 (the paper's sizes are not known)"
    setting = f"{of.title}, convolutional network, {len(found)} seeds"
    picture = draw(9.6, 6.0, lambda f: _inverses(f, of, run), heatmaps=True)
    return Outcome(claims, setting, _details(of, found, run, sizes), caption, picture)


# ---- rows ------------------------------------------------------------------------------------------------------------


def _independent_covariance(found: Networks, departures: tuple[str, ...], more: str = "") -> Claim:
    shares = medians(found, "empirical", "covariance")
    return Claim(
        "the gradient independence assumption holds very well in practice: the covariance of different units' "
        "gradients is zero (section III-C, eq. 5)",
        "0",
        f"share of ‖cov‖² between different units: {_by_layer(found, 'empirical', 'covariance')}",
        f"at most {INDEPENDENT:g} in every layer, by the seeds' median",
        max(shares.values()) <= INDEPENDENT,
        departures,
        more.removeprefix("; "),
        shares,
    )


def _independent(found: Networks, departures: tuple[str, ...], more: str = "") -> Claim:
    shares = medians(found, "empirical", "off_unit")
    return Claim(
        "off-diagonal blocks of the layer FIM are zero (section III-C, eqs. 4 and 7)",
        "0",
        f"share of ‖F‖² off the components: {_by_layer(found, 'empirical', 'off_unit')}",
        f"at most {INDEPENDENT:g} in every layer, by the seeds' median",
        max(shares.values()) <= INDEPENDENT,
        departures,
        f"of the exact F (eq. 3): {_by_layer(found, 'exact', 'off_unit')}; before training: "
        f"{_by_layer(found, 'initial', 'off_unit')}{more}",
        shares,
    )


def _as_general(found: Networks, departures: tuple[str, ...]) -> Claim:
    shares = medians(found, "empirical", "off_unit")
    dense = max(value for layer, value in shares.items() if layer != "conv")
    return Claim(
        "the convolutional layer structure does not affect the generality of the derivative independence assumption "
        "(section III-D)",
        "no number",
        f"share of ‖F‖² off the components: {_by_layer(found, 'empirical', 'off_unit')}",
        "the convolution's share is not above the dense layers' largest",
        shares["conv"] <= dense,
        departures,
        f"of the exact F (eq. 3): {_by_layer(found, 'exact', 'off_unit')}",
        shares,
    )


def _zero_mean(found: Networks, departures: tuple[str, ...], more: str = "") -> Claim:
    means = medians(found, "empirical", "mean")
    return Claim(
        "the expectation of the score function is zero (section III-C, eqs. 6 and 7)",
        "0",
        f"‖mean of D‖² to the mean of ‖D‖²: {_by_layer(found, 'empirical', 'mean', '.2g')}",
        f"at most {ZERO:g} in every layer, by the seeds' median (the data's labels; with the model's own it is zero by "
        "definition)",
        max(means.values()) <= ZERO,
        departures,
        more.removeprefix("; "),
        means,
    )


def _more_precise(found: Networks, departures: tuple[str, ...], more: str = "") -> Claim:
    ours, theirs = (medians(found, "empirical", name) for name in ("component-wise", "K-FAC"))
    return Claim(
        "K-FAC produces a low-accuracy approximation of the layer FIMs, CW-NGD a precise one (section III-B)",
        "no number",
        f"relative Frobenius errors, component-wise and K-FAC: {_beside(found, 'empirical')}",
        "the component-wise error is the smaller one in every layer, by the seeds' median",
        all(ours[layer] < theirs[layer] for layer in ours),
        departures,
        f"of the exact F (eq. 3): {_beside(found, 'exact')}; entry-wise: "
        f"{_by_layer(found, 'empirical', 'entry-wise')}{more}",
        {f"{layer}_component_wise": ours[layer] for layer in ours}
        | {f"{layer}_kfac": theirs[layer] for layer in theirs},
    )


def _invertible(found: Networks, departures: tuple[str, ...], key: str, reading: str) -> Claim:
    values = medians(found, "empirical", key)
    return Claim(
        f"a relatively small γ is highly effective in making the FIMs invertible (section III-E); {reading}",
        "γ = 1e-4",
        f"largest condition number of a damped component: {_by_layer(found, 'empirical', key, '.2g')}",
        f"below {SINGLE:.2g} in every layer, by the seeds' median: the reciprocal of float32's ε, in which TensorFlow "
        "computes",
        max(values.values()) < SINGLE,
        departures,
        f"singular without damping (in float64): {_by_layer(found, 'empirical', 'singular', '.0%')} of the components",
        values,
    )


def _by_layer(found: Networks, kind: str, name: str, digits: str = ".2f") -> str:
    """Medians and ranges of a measurement, layer by layer."""
    layers = {layer: [one[kind][layer][name] for one in found] for layer in found[0][kind]}
    return ", ".join(f"{layer} {spread(values, digits)}" for layer, values in layers.items())


def _beside(found: Networks, kind: str) -> str:
    """Medians of both errors, layer by layer."""
    ours, theirs = (medians(found, kind, name) for name in ("component-wise", "K-FAC"))
    return ", ".join(f"{layer} {ours[layer]:.2f} and {theirs[layer]:.2f}" for layer in ours)


def _details(of: Problem, found: Networks, run: Run, sizes: str) -> str:
    epochs = SCALES[run.scale].epochs
    return (
        f"{of.title}, {sizes}, trained by {epochs} epoch{'s' if epochs > 1 else ''} of CW-NGD with the paper's options "
        f"(COST a mean, batch {of.batch}) to {spread([one['accuracy'] for one in found], '.1f', 100.0, ' %')} training "
        f"accuracy; F over one batch of {of.batch} training images in float64; {len(found)} seeds, medians, ranges in "
        "brackets"
    )


# ---- pictures --------------------------------------------------------------------------------------------------------


def _four(figure: Figure, of: Problem, run: Run) -> None:
    """Two Fishers of all layers, and what three approximations keep of them."""
    methods = {"layer-wise": "layer", **{name: METHODS[name] for name in ("component-wise", "entry-wise")}}
    rows = {"empirical": "empirical F (eq. 1)", "exact": "exact F (eq. 3)"}
    for axes, (kind, title) in zip(figure.subplots(2, 4), rows.items(), strict=True):
        whole = fisher(of, SCALES[run.scale].epochs, run.seed + 1, kind, run.device)
        edges, names = list(whole.space.offsets), whole.space.names
        exact = whole.to_dense("unit").cpu()
        top = plotting.shared_maximum([plotting.heatmap_info(exact, edges=edges)], BRIGHT)
        images = {title: exact}
        for name, method in methods.items():
            kept = approximate(whole, method).to_dense("unit").cpu()
            images[f"{name}: {float(kept.square().sum() / exact.square().sum()):.2f}"] = kept
        for ax, (words, image) in zip(axes, images.items(), strict=True):
            plotting.heatmap(image, ax=ax, edges=edges, layers=names, vmax=top, colorbar=False, title="")
            ax.set_title(words, fontsize=9)


def _inverses(figure: Figure, of: Problem, run: Run) -> None:
    """F of the convolution and its damped inverse, each beside its components."""
    whole = fisher(of, SCALES[run.scale].epochs, run.seed + 1, "empirical", run.device)
    units = whole.units("conv").cpu()
    full = whole.unit_block(0, 0).cpu()
    inverse = torch.linalg.inv(full + GAMMA * torch.eye(len(full), dtype=full.dtype))
    inverses = torch.linalg.inv(units + GAMMA * torch.eye(units.shape[1], dtype=full.dtype))
    rows = {"F": (full, torch.block_diag(*units)), "(F + γI)⁻¹": (inverse, torch.block_diag(*inverses))}
    for axes, (name, (left, middle)) in zip(figure.subplots(2, 3), rows.items(), strict=True):
        apart = float((left - middle).norm() / left.norm())
        titles = (f"{name} of the convolution", "its components", f"|difference|, {apart:.2g} in norm")
        edges = range(0, len(full) + 1, units.shape[1])
        for ax, words, image in zip(axes, titles, (left, middle, left - middle), strict=True):
            scale = left if left is full else image  # inverses differ so much that one scale would hide one of them
            top = plotting.shared_maximum([plotting.heatmap_info(scale)], BRIGHT)
            plotting.heatmap(image, ax=ax, unit_edges=list(edges), units=True, vmax=top, title="")
            ax.set_title(words, fontsize=9)


def _groups(figure: Figure, layer: nn.Conv2d, image: Tensor) -> None:
    """An image, the filters in their groups, and the channels."""
    filters, channels = layer.weight.detach()[:, 0].cpu(), layer(image).detach()[0].cpu()
    left, middle, right = np.asarray(figure.subfigures(1, 3, width_ratios=(1.0, 1.5, 1.5)))
    _images(left, [image[0, 0].cpu()], 1, "an image", "Greys")
    _images(middle, list(filters), 4, f"{len(filters)} groups of weights", DIVERGING)
    _images(right, list(channels), 4, f"{len(channels)} output channels", DIVERGING)


def _images(figure: Any, images: Sequence[Tensor], columns: int, title: str, colors: str) -> None:
    """Small images on one scale; those with signs have it centred at zero."""
    top = max(float(image.abs().max()) for image in images)
    low = -top if colors == DIVERGING else 0.0
    axes = figure.subplots(-(-len(images) // columns), columns, squeeze=False).flatten()
    for place, (ax, image) in enumerate(zip(axes, images, strict=True)):
        ax.imshow(image, cmap=colors, vmin=low, vmax=top)
        ax.set(xticks=[], yticks=[])
        if len(images) > 1:
            ax.set_title(f"$o = {place + 1}$", fontsize=8)
    figure.suptitle(title, fontsize=10)
