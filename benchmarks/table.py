"""The analysis' numbers as lines for the terminal, and the page of Markdown with all benchmarks' parts.

Drawn from the saved results alone: each benchmark writes its own JSON file and the whole page from all files.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks import defaults_table, networks, profiles, scaling_table, steps_table, workloads
from benchmarks.large import GOALS as LARGE
from benchmarks.markdown import best_peer, profiled, provenance, table

WORKLOADS = workloads.WORKLOADS | networks.WORKLOADS
FILES = ("results.json", "optim.json", "defaults.json", "scaling.json")


def line(name: str, row: dict[str, Any]) -> str:
    """One row for the terminal."""
    if name in LARGE:
        _, seconds, gib = LARGE[name]
        text = f"{name:12} {row['wall']:7.2f} s (goal {seconds:g}), CPU {row['cpu']:.2f} s, "
        return text + f"{row['gib']:.2f} GiB (goal {gib:g})"
    workload, ours = WORKLOADS[name], row["ours"]
    text = f"{name:12} {ours['x']:7.2f}x {ours['ms']:8.1f} ms (pass {ours['pass_ms']:.2f} ms), "
    text += f"{ours['gflop']:6.2f} GFLOP"
    if workload.goal is not None:
        text += f", goal {workload.goal:g} {workload.unit}: {ours[workload.unit] / workload.goal:.2f} of it"
    if huge := row.get("huge_pages"):
        text += f"\n{'':14}with huge pages: {huge['x']:.2f}x {huge['ms']:.1f} ms"
    for peer_name, peer in row["peers"].items():
        text += f"\n{'':14}{peer_name}: " + (f"{peer['x']:.2f}x {peer['ms']:.1f} ms" if "ms" in peer else peer["why"])
    return text


def page(
    analysis: dict[str, Any] | None,
    steps: dict[str, Any] | None,
    trained: dict[str, Any] | None = None,
    growth: dict[str, Any] | None = None,
) -> str:
    """The whole page, from what is there."""
    parts = [] if analysis is None else part(analysis)
    if steps is not None:
        parts += steps_table.part(steps)
    if trained is not None:
        parts += defaults_table.part(trained)
    if growth is not None:
        parts += scaling_table.part(growth)
    return "\n\n".join(parts) + "\n"


def part(results: dict[str, Any]) -> list[str]:
    """The paragraphs and tables of the analysis."""
    rows = results["rows"]
    parts = [
        "# What fisherviz costs",
        "Written by `python -m benchmarks.fisher`; the numbers are in `results.json`. "
        f"{provenance(results['machine'])}",
        "× is the CPU time on one thread over that of one forward+backward pass of the same batch, measured before and "
        "after each round in the same process; both are minima over the rounds. The GFLOP are counted by torch's "
        "dispatcher (matrix products, convolutions, factorisations; element-wise work is not in them). Wall time is "
        "that of two threads, for information. A peer is timed only after its product with a random vector equals ours "
        "(up to the scales and blocks named in `peers.py`; sampled labels within the noise of sampling).",
        "Fresh memory is handed out in pages of 4 KiB whose first touch can cost more than the arithmetic on them; the "
        "column *huge pages* is the same measured with `THP_MEM_ALLOC_ENABLE=1`, torch's own switch (Linux).",
        _summary(rows),
        *_missed(rows),
        "## Every peer",
        _peers(rows),
    ]
    if any(name in rows for name in LARGE):
        parts += ["## Wall time and memory", _large(rows)]
    return parts


def _summary(rows: dict[str, Any]) -> str:
    body = []
    for name, row in rows.items():
        if name in LARGE:
            continue
        workload, ours = WORKLOADS[name], row["ours"]
        best = best_peer(row)
        if workload.goal is None:
            goal, share = "best peer", float("nan") if best is None else ours["ms"] / best[1]["ms"]
        else:
            goal = f"{workload.goal:g}×" if workload.unit == "x" else f"{workload.goal:g} ms"
            share = ours[workload.unit] / workload.goal
        against = "–" if best is None else f"{best[0]} {best[1]['x']:.3g}× ({best[1]['x'] / ours['x']:.1f} of ours)"
        wall = f"{ours['wall_ms_two_threads']:.3g} ms" if "wall_ms_two_threads" in ours else "–"
        body.append([
            f"**{name}** {workload.text}", goal, f"{ours['x']:.3g}×, {ours['ms']:.3g} ms", f"{share:.2f}", against,
            f"{ours['gflop']:.3g}", f"{row['huge_pages'][workload.unit]:.3g} {'×' if workload.unit == 'x' else 'ms'}",
            wall,
        ])  # fmt: skip
    return table(["work", "goal", "ours", "ours / goal", "best peer", "GFLOP", "huge pages", "two threads"], body)


def _missed(rows: dict[str, Any]) -> list[str]:
    """What the profile says of each goal that is missed."""
    goals = {name: (w.goal, w.unit) for name, w in WORKLOADS.items() if w.goal is not None}
    for name in WORKLOADS.keys() & rows.keys() - goals.keys():
        if (best := best_peer(rows[name])) is not None:
            goals[name] = best[1]["ms"], "ms"
    return profiled(rows, goals, profiles.WORKLOADS)


def _peers(rows: dict[str, Any]) -> str:
    body = []
    for name, row in rows.items():
        for peer_name, peer in row.get("peers", {}).items():
            if "ms" in peer:
                difference = f"{peer['difference']:.1g}" + (f" ({peer['note']})" if peer["note"] else "")
                costs = [f"{peer['x']:.3g}×", f"{peer['ms']:.3g} ms", f"{peer['gflop']:.3g}"]
                body.append([name, peer_name, *costs, difference])
            else:
                body.append([name, peer_name, "–", "–", "–", peer["why"].splitlines()[0][:120]])
    return table(["work", "peer", "passes", "CPU time", "GFLOP", "difference from ours"], body)


def _large(rows: dict[str, Any]) -> str:
    body = []
    for name, (text, seconds, gib) in LARGE.items():
        if name in rows:
            row = rows[name]
            measured = f"{row['wall']:.3g} s ({row['cpu']:.3g} s CPU), {row['gib']:.2f} GiB"
            body.append([text, f"{seconds:g} s, {gib:g} GiB", measured])
    return table(["work", "goal", "ours"], body)


def write_readme(folder: Path) -> None:
    """Write the page from the results that the folder holds."""
    results = []
    for name in FILES:
        path = folder / name
        results.append(json.loads(path.read_text(encoding="utf-8")) if path.exists() else None)
    write_whole(folder / "README.md", page(*results))


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
