"""The benchmark of the optimizers' steps: `python -m benchmarks.optim [NAME ...]`, everything without names.

Each row runs in a process of its own, with the public implementations that are installed (the bench extra) in the same
process. Writes benchmarks/optim.json and the second part of benchmarks/README.md; rows that were not asked for stay as
they were.
"""

from __future__ import annotations

import argparse
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import depth, steps_table, table
from benchmarks.cycles import StepTiming, measure_steps
from benchmarks.running import HERE, in_own_process, machine
from benchmarks.step_peers import PEERS, check
from benchmarks.steps import ROWS, sgd

DEPTH = "depth"
NAMES = [*ROWS, DEPTH]


def run_one(name: str, peers: bool = True, rounds: int | None = None) -> dict[str, Any]:
    """Measure one row in this process.

    Args:
        name: one of `NAMES`.
        peers: whether the public implementations are measured too.
        rounds: of timing at most; None: the row's own.

    Returns:
        The row.

    Raises:
        FloatingPointError: our training diverged, so that its steps may not be the usual ones.
    """
    if name == DEPTH:
        return depth.run(rounds)
    row = ROWS[name]
    few = row.rounds if rounds is None else min(rounds, row.rounds)
    problem = row.problem()
    ours = row.trainer(problem)
    found: dict[str, Any] = {
        "ours": _numbers(measure_steps(ours.step, sgd(problem).step, row.cycle, few)),
        "rounds": few,
        "peers": {},
    }
    if not math.isfinite(ours.loss):
        raise FloatingPointError(f"{name}: the loss became {ours.loss} after {ours.k} steps; lower its lr.")
    del ours
    for peer_name, peer in PEERS.get(name, {}).items() if peers else ():
        if not peer.installed:
            found["peers"][peer_name] = {"why": "not installed"}
            continue
        try:
            alike = check(problem, peer)
            step = peer.trainer(problem, row.cycle)
            timing = measure_steps(step, sgd(problem).step, row.cycle, min(few, 3), wall=False)
        except Exception as problem_met:
            found["peers"][peer_name] = {"why": f"{type(problem_met).__name__}: {problem_met}"}
            continue
        found["peers"][peer_name] = _numbers(timing) | alike | {"note": peer.note}
    return found


def _numbers(timing: StepTiming) -> dict[str, float]:
    numbers = {
        "ms": 1e3 * timing.seconds,
        "sgd_ms": 1e3 * timing.sgd,
        "x": timing.ratio,
        "slowest_ms": 1e3 * timing.slowest,
        "usual_ms": 1e3 * timing.usual,
        "gflop": timing.gflop,
        "sgd_gflop": timing.sgd_gflop,
    }
    if timing.wall_two_threads is not None:
        numbers["wall_ms_two_threads"] = 1e3 * timing.wall_two_threads
    return numbers


def save(folder: Path, name: str, row: dict[str, Any]) -> None:
    """Put a row among those measured before, and write the page anew."""
    path = folder / "optim.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    results["rows"][name] = row | {"measured": datetime.now(UTC).isoformat(timespec="seconds")}
    results["rows"] = {known: results["rows"][known] for known in NAMES if known in results["rows"]}
    results["machine"] = machine()
    table.write_whole(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    table.write_readme(folder)


def main() -> None:
    """Measure, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--no-peers", action="store_true", help="measure fisherviz alone, and write nothing")
    parser.add_argument("--rounds", type=int, help="rounds of timing at most, without huge pages: quick, noisy")
    parser.add_argument("--here", action="store_true", help="measure one row in this process, print it as JSON")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"no row is called {', '.join(unknown)}; they are {', '.join(NAMES)}")
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    if arguments.here:
        print(json.dumps(run_one(arguments.names[0], not arguments.no_peers, arguments.rounds)))
        return
    rounds = [] if arguments.rounds is None else ["--rounds", str(arguments.rounds)]
    for name in arguments.names or NAMES:
        alone = ["--here", name, *rounds, "--no-peers"]
        row = in_own_process("benchmarks.optim", alone if arguments.no_peers else alone[:-1])
        if name != DEPTH and not rounds:
            row["huge_pages"] = in_own_process("benchmarks.optim", alone, huge_pages=True)["ours"]
        print(steps_table.line(name, row), flush=True)
        if not arguments.no_peers:  # after every row: a run that is stopped keeps what it measured
            save(HERE, name, row)


if __name__ == "__main__":
    main()
