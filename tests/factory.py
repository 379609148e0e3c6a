"""Comparisons made of nothing but random numbers, for tests of what is saved, drawn and written."""

import numpy as np
import pandas as pd

from fisherviz.results import blocks
from fisherviz.results.comparison import Comparison

METHODS = (
    "identity", "diagonal", "layer", "cw-ngd", "kfac-full", "kfac", "kfac-tridiagonal", "ekfac", "foof",
    "nearest-kronecker",
)  # fmt: skip
ERRORS = dict(zip(METHODS, (0.997, 0.97, 0.55, 0.8, 0.31, 0.62, 0.36, 0.6, 0.9, 0.58), strict=True))
PASSES = dict(zip(METHODS, (0.02, 1.9, 8.0, 6.0, 3.1, 2.4, 2.9, 5.5, 0.9, 40.0), strict=True))


def make_comparison(layers=("0", "2", "4", "6"), units=4, fan_in=5, methods=METHODS, seed=0):
    """A comparison with every metric, array and fact that the package writes."""
    rng = np.random.default_rng(seed)
    size = units * (fan_in + 1)
    rows = []
    for method in methods:
        error, passes = ERRORS.get(method, 0.7), PASSES.get(method, 10.0)
        whole = {
            "relative_frobenius": error, "relative_spectral": 0.8 * error, "relative_max": 0.9 * error,
            "frobenius_cosine": np.sqrt(max(0.0, 1 - error**2)), "inverse_frobenius": 1.3 * error,
            "direction_cosine": 1 - error / 2, "direction_error": 1.1 * error, "model_decrease": 1 - error**2,
            "kl": 40 * error, "seconds": 0.02 * passes, "bytes": 1e4 * passes, "passes": passes,
        }  # fmt: skip
        if method == "foof":
            del whole["kl"]
        rows += [(method, "all", "all", name, value) for name, value in whole.items()]
        for row in layers:
            for col in layers:
                scale = 1.0 if row == col else 1.2
                value = 0.0 if method == "layer" and row == col else scale * error * rng.uniform(0.5, 1.2)
                rows.append((method, row, col, "relative_frobenius", value))
            rows.append((method, row, row, "direction_cosine", 1 - error * rng.uniform(0.1, 0.6)))
            rows.append((method, row, row, "off_unit_share", rng.uniform(0.5, 0.9)))
    frame = pd.DataFrame(rows, columns=["method", "row", "col", "metric", "value"])
    return Comparison(frame, _meta(layers, units, fan_in), _arrays(rng, len(layers), size, units, methods))


def _meta(layers, units, fan_in):
    size = units * (fan_in + 1)
    return {
        "fisherviz": "0.1.0", "torch": "2.13.0", "created": "2026-01-02T03:04:05+00:00", "kind": "exact",
        "samples": 1, "reduction": "mean", "likelihood": "Categorical", "damping": 0.01, "examples": 1797,
        "parameters": size * len(layers),
        "layers": [
            {"name": name, "kind": "linear", "path": "structured", "num_parameters": size,
             "parameters": [f"{name}.weight", f"{name}.bias"], "in_features": fan_in, "out_features": units,
             "bias": True, "skipped_reason": ""}
            for name in layers
        ],
        "left_out": [{"name": "frozen.weight", "why": "requires_grad is False"}],
        "fingerprints": {"data": "ab12", "weights": "cd34"},
        "settings": {"seed": 0, "setting": "kfac-figure-2"},
        "forward_backward_seconds": 0.02,
        "notes": ["kl of foof is left out: its scale is not the Fisher's."],
        "cumulants": {"error": 2189.0, "bound": 3058.0},
    }  # fmt: skip


def _arrays(rng, count, size, units, methods):
    side = count * size
    root = rng.standard_normal((3 * side, side)) * np.exp(rng.standard_normal(side))
    exact = root.T @ root / len(root)
    inverse = np.linalg.inv(exact + 0.1 * np.eye(side))
    block = np.kron(np.eye(count), np.ones((size, size)))
    edges = np.arange(0, side + 1, size)

    def means(matrix):
        return np.abs(matrix).reshape(count, size, count, size).mean(axis=(1, 3))

    eigenvalues = np.linalg.eigvalsh(exact)[::-1]
    arrays = {
        "heatmap/exact": np.abs(exact), "inverse/exact": np.abs(inverse), "heatmap_edges": edges,
        "heatmap_unit_edges": np.arange(0, side + 1, size // units), "block_means/exact": means(exact),
        "block_means_inverse/exact": means(inverse), "spectrum/exact": eigenvalues,
    }  # fmt: skip
    cut = blocks.layout([(units, size // units)] * count)
    arrays["blocks_layout"], arrays["blocks_torch"] = cut.to_array(), np.tile(np.arange(size), count)

    def hold(suffix, label, matrix, reference=None):
        packed = blocks.pack((matrix + matrix.T) / 2, reference, cut)
        arrays[f"blocks{suffix}/{label}"], arrays[f"entries{suffix}/{label}"] = packed

    hold("", "exact", exact)
    hold("_inverse", "exact", inverse)
    for method in methods:
        error = ERRORS.get(method, 0.7)
        noise = 1 + error * rng.uniform(-0.5, 0.5, exact.shape)
        near = exact * noise * (block if method != "kfac-full" else 1)
        arrays[f"heatmap/{method}"], arrays[f"difference/{method}"] = np.abs(near), np.abs(exact - near)
        hold("", method, near, exact)
        hold("_inverse", method, inverse * block, inverse)
        arrays[f"inverse/{method}"] = np.abs(inverse * block)
        arrays[f"inverse-difference/{method}"] = np.abs(inverse - inverse * block)
        arrays[f"block_means/{method}"] = means(near)
        arrays[f"spectrum/{method}"] = eigenvalues * (1 - error / 3) ** np.arange(side)
    return arrays
