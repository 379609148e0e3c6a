"""The steps' numbers as lines for the terminal and as the second part of the page; drawn from saved results alone."""

from __future__ import annotations

from typing import Any

from benchmarks import profiles
from benchmarks.depth import DEPTHS, EXACT_UP_TO, FROM, METHODS, TO
from benchmarks.markdown import best_peer, profiled, provenance, table
from benchmarks.step_peers import ALIKE, CHECK_DAMPING
from benchmarks.steps import RELATIONS, ROWS


def line(name: str, row: dict[str, Any]) -> str:
    """One row for the terminal."""
    if name not in ROWS:
        growth = row["growth"]
        return f"{name:24} from {FROM} to {TO} layers: TENGraD {growth['tengrad']:.2f}x, SGD {growth['sgd']:.2f}x"
    told, ours = ROWS[name], row["ours"]
    text = f"{name:24} {ours['x']:7.2f}x {ours['ms']:8.1f} ms (SGD {ours['sgd_ms']:.2f} ms), {ours['gflop']:6.2f} GFLOP"
    if told.goal is not None:
        text += f", goal {told.goal:g} {told.unit}: {ours[told.unit] / told.goal:.2f} of it"
    if huge := row.get("huge_pages"):
        text += f"\n{'':26}with huge pages: {huge['x']:.2f}x {huge['ms']:.1f} ms"
    for peer_name, peer in row["peers"].items():
        text += f"\n{'':26}{peer_name}: " + (f"{peer['x']:.2f}x {peer['ms']:.1f} ms" if "ms" in peer else peer["why"])
    return text


def part(results: dict[str, Any]) -> list[str]:
    """The paragraphs and tables."""
    rows = results["rows"]
    parts = [
        "# What a step costs",
        f"Written by `python -m benchmarks.optim`; the numbers are in `optim.json`. {provenance(results['machine'])}",
        "× is the CPU time of one step on one thread over that of one plain SGD step of the same network and batch in "
        "the same process: 784-1000-1000-1000-10, ReLU, no biases, batch 100, float32, unless the row says otherwise. "
        "Forward and backward passes are in both. Whole cycles are timed, from one factorisation to the next, in "
        "blocks of ten steps between blocks of ten SGD steps; of every position in the cycle the fastest round counts, "
        "and the mean over the positions is the cost, for SGD alike. *Slowest step* is the one that factorises. The "
        "GFLOP are those of one step, mean over the cycle, with the multiple of SGD's in brackets.",
        _summary(rows),
        *profiled(rows, {name: (told.goal, told.unit) for name, told in ROWS.items()}, profiles.STEPS),
    ]
    if few := _few(rows):
        parts.append(few)
    if related := _relations(rows):
        parts.append(related)
    parts += [
        "## Every public implementation of a step",
        f"Timed after its direction on one batch has a cosine of at least {ALIKE:g} with ours (empirical kind, same "
        f"labels, factored damping λ = {CHECK_DAMPING:g}); the last column says how far the plain gradient is from "
        "that direction. Timed are one sampled label per example and a factor average where there is one. Figures "
        "*measured earlier* are not of this run: the code is not on a package index, or could not be installed; they "
        "were taken on two other cores of about 85 GFLOP/s each, with the same kind of ratio.",
        _peers(rows),
    ]
    if "depth" in rows:
        parts += ["## Cost against depth", *_depth(rows["depth"])]
    return parts


def _few(rows: dict[str, Any]) -> str:
    """Which rows are provisional."""
    names = [name for name in ROWS if name in rows and rows[name]["rounds"] < ROWS[name].rounds]
    return f"Provisional, of fewer rounds than the benchmark takes: {', '.join(names)}." if names else ""


def _summary(rows: dict[str, Any]) -> str:
    body = []
    for name, told in ROWS.items():
        if name not in rows:
            continue
        row, ours = rows[name], rows[name]["ours"]
        goal = "–" if told.goal is None else f"{told.goal:g}{'×' if told.unit == 'x' else ' ms'}"
        share = "–" if told.goal is None else f"{ours[told.unit] / told.goal:.2f}"
        best = best_peer(row)
        against = "–" if best is None else f"{best[0]} {best[1]['x']:.3g}× ({best[1]['x'] / ours['x']:.1f} of ours)"
        huge = "–"
        if "huge_pages" in row:
            huge = f"{row['huge_pages'][told.unit]:.3g} {'×' if told.unit == 'x' else 'ms'}"
        body.append([
            f"**{name}** {told.text}", goal, f"{ours['x']:.3g}×, {ours['ms']:.3g} ms", share, against,
            told.earlier or "–", f"{ours['gflop']:.3g} ({ours['gflop'] / ours['sgd_gflop']:.3g})",
            f"{ours['slowest_ms']:.3g} ms", huge, f"{ours['wall_ms_two_threads']:.3g} ms",
        ])  # fmt: skip
    head = ["step", "goal", "ours", "ours / goal", "best peer", "measured earlier", "GFLOP (of SGD's)",
            "slowest step", "huge pages", "two threads"]  # fmt: skip
    return table(head, body)


def _relations(rows: dict[str, Any]) -> str:
    body = []
    for first, second, bound, goal in RELATIONS:
        if first in rows and second in rows:
            ratio = rows[first]["ours"]["x"] / rows[second]["ours"]["x"]
            body.append([f"{first} / {second}", "–" if goal is None else f"{bound} {goal:g}", f"{ratio:.2f}"])
    return table(["ratio of costs", "goal", "ours"], body) if body else ""


def _peers(rows: dict[str, Any]) -> str:
    body = []
    for name, row in rows.items():
        for peer_name, peer in row.get("peers", {}).items():
            if "ms" in peer:
                costs = [f"{peer['x']:.3g}×", f"{peer['ms']:.3g} ms", f"{peer['gflop']:.3g}"]
                alike = f"1 − {max(0.0, 1 - peer['cosine']):.0e}"
                body.append([name, peer_name, *costs, alike, f"{peer['gradient_cosine']:.2f}", peer["note"]])
            else:
                body.append([name, peer_name, "–", "–", "–", "–", "–", peer["why"].splitlines()[0][:120]])
    head = ["step", "peer", "SGD steps", "CPU time", "GFLOP", "cosine with ours", "gradient's cosine", "remark"]
    return table(head, body)


def _depth(row: dict[str, Any]) -> list[str]:
    body = []
    for depth in DEPTHS:
        found = row["depths"][str(depth)]
        times = [f"{found[m]['ms']:.3g} ms" if m in found else "–" for m in METHODS]
        kib = [f"{found[m]['kib']:.3g}" if m in found else "–" for m in METHODS]
        body.append([str(depth), *times, f"{found['tengrad']['ms'] / found['sgd']['ms']:.3g}", *kib])
    head = ["hidden layers", "SGD", "TENGraD", "exact", "TENGraD / SGD", "KiB: SGD", "TENGraD", "exact"]
    growth, slopes, exact = row["growth"], row["slopes"], row["depths"]
    contrast = exact[str(EXACT_UP_TO)]["exact"]["ms"] / exact[str(FROM)]["exact"]["ms"]
    return [
        "Shrestha's figure 5: hidden layers of 20 units, batch 128, inputs and output as in the weather table, CPU "
        "time of one step on one thread; the memory is that of all tensors at its peak, network included, data not.",
        table(head, body),
        f"From {FROM} to {TO} hidden layers ({TO // FROM} times as many) a step costs {growth['sgd']:.2f} times as "
        f"much with SGD and {growth['tengrad']:.2f} times with TENGraD: powers {slopes['sgd']:.2f} and "
        f"{slopes['tengrad']:.2f} of the depth, work per layer being power 1. The exact natural gradient "
        f"grows {contrast:.1f} times from {FROM} to {EXACT_UP_TO} alone.",
    ]
