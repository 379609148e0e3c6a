"""How costs grow with width and with the number of examples, against the count: `python -m benchmarks.scaling`.

Writes benchmarks/scaling.json, scaling.png and the page. A cell runs in a process of its own, and a run that is stopped
keeps what it has measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

import fisherviz as fv
from benchmarks.measure import measure, operations
from benchmarks.running import HERE, in_own_process, machine
from benchmarks.scaling_table import draw
from benchmarks.table import write_readme, write_whole
from benchmarks.workloads import DAMPING, Case

INPUTS, CLASSES, LAYERS = 128, 10, 3
WIDTHS, WIDTH = (64, 128, 256, 512, 1024), 256
EXAMPLES, N = (64, 128, 256, 512, 1024, 2048), 512
ROUNDS = 5


def _fisher(case: Case, kind: str = "exact") -> fv.Fisher:
    return case.probe.fisher(case.batches, kind=kind)


REQUESTS: dict[str, tuple[str, Callable[[Case], Any]]] = {
    "diagonal": ("exact diagonal", lambda case: _fisher(case).diagonal()),
    "K-FAC": ("K-FAC factors", lambda case: fv.approximate(_fisher(case), "kfac")),
    "product": ("F @ v", lambda case: _fisher(case) @ case.v),
    "norm": ("Frobenius norm", lambda case: _fisher(case).norm()),
    "solve": ("natural gradient, one sampled label", lambda case: _fisher(case, "mc").natural_gradient(DAMPING)),
}
"""In words, and what is asked of a new Fisher."""


def problem(width: int, examples: int) -> Case:
    """A tanh network of three hidden layers on random data."""
    torch.manual_seed(0)
    sizes = [INPUTS, *[width] * LAYERS, CLASSES]
    modules = [m for d_in, d_out in pairwise(sizes) for m in (nn.Linear(d_in, d_out), nn.Tanh())]
    return Case(nn.Sequential(*modules[:-1]), torch.randn(examples, INPUTS), torch.randint(CLASSES, (examples,)))


def cell(width: int, examples: int) -> dict[str, Any]:
    """All requests of one network and batch: passes by time and by count."""
    case = problem(width, examples)
    one_pass = operations(case.one_pass)
    found = {}
    for name, (_, ask) in REQUESTS.items():
        timing = measure(lambda ask=ask: ask(case), case.one_pass, ROUNDS, wall=False)
        found[name] = {"x": timing.ratio, "ms": 1e3 * timing.seconds, "count": timing.gflop / one_pass}
    return {"pass_ms": 1e3 * timing.forward_backward, "requests": found}


def main() -> None:
    """Measure what is not there yet, draw it, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure all of it anew")
    parser.add_argument(
        "--cell", nargs=2, type=int, metavar=("WIDTH", "N"), help="measure one in this process, as JSON"
    )
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(cell(*arguments.cell)))
        return
    path = HERE / "scaling.json"
    results: dict[str, Any] = {"width": {}, "examples": {}}
    if path.exists() and not arguments.again:
        results = json.loads(path.read_text(encoding="utf-8"))
    asked = [("width", w, (w, N)) for w in WIDTHS] + [("examples", n, (WIDTH, n)) for n in EXAMPLES]
    for key, size, sizes in asked:
        if str(size) not in results[key]:
            results[key][str(size)] = in_own_process("benchmarks.scaling", ["--cell", *map(str, sizes)])
            results["machine"] = machine()
            results["words"] = {name: words for name, (words, _) in REQUESTS.items()}
            results["settings"] = {"inputs": INPUTS, "classes": CLASSES, "width": WIDTH, "examples": N}
            write_whole(path, json.dumps(results, indent=1) + "\n")
            print(key, size, {name: round(row["x"], 2) for name, row in results[key][str(size)]["requests"].items()})
    (HERE / "scaling.png").write_bytes(draw(results))
    write_readme(HERE)


if __name__ == "__main__":
    main()
