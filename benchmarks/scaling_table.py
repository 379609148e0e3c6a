"""How costs grow, as a picture and as a part of the page; drawn from saved results alone."""

from __future__ import annotations

import io
from typing import Any

from benchmarks.markdown import provenance, table


def part(results: dict[str, Any]) -> list[str]:
    """The paragraphs and tables."""
    own, classes = results["settings"], results["settings"]["classes"]
    said = [
        "# How costs grow",
        "Written by `python -m benchmarks.scaling`; the numbers are in `scaling.json`. "
        f"{provenance(results['machine'])}",
        f"A tanh network {own['inputs']}-w-w-w-{classes} in float32, one thread: CPU time over that of one "
        "forward+backward pass of the same batch, measured before and after each round, and in brackets the counted "
        f"operations over that pass's. Against the width N = {own['examples']}, against N the width is {own['width']}. "
        f"Of the exact kind each example has {classes - 1} vectors.",
        "![Cost in passes against width and number of examples](scaling.png)",
    ]
    for key, axis in (("width", "width"), ("examples", "examples")):
        sizes = sorted(map(int, results[key]))
        body = []
        for name, words in results["words"].items():
            rows = [results[key][str(size)]["requests"][name] for size in sizes]
            body.append([words, *(f"{row['x']:.3g} ({row['count']:.3g})" for row in rows)])
        said.append(table([axis, *map(str, sizes)], body))
    return said


def draw(results: dict[str, Any]) -> bytes:
    """Passes by time, and by count as dashes, on two axes; a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    own = results["settings"]
    labels = {"width": f"width (N = {own['examples']})", "examples": f"examples N (width {own['width']})"}
    figure, axes = plt.subplots(1, 2, figsize=(6.9, 3.3), sharey=True, layout="constrained")
    for ax, (key, label) in zip(axes, labels.items(), strict=True):
        sizes = sorted(map(int, results[key]))
        for k, (name, words) in enumerate(results["words"].items()):
            rows = [results[key][str(size)]["requests"][name] for size in sizes]
            ax.plot(sizes, [row["x"] for row in rows], "o-", color=f"C{k}", ms=3, lw=1.2, label=words)
            ax.plot(sizes, [row["count"] for row in rows], "--", color=f"C{k}", lw=1)
        ax.set(xscale="log", yscale="log", xlabel=label)
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.minorticks_off()
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("forward+backward passes")
    axes[0].plot([], [], "k-", lw=1.2, label="CPU time")
    axes[0].plot([], [], "k--", lw=1, label="count")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    held = io.BytesIO()
    figure.savefig(held, dpi=150)
    plt.close(figure)
    return held.getvalue()
