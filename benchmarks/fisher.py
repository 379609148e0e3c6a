"""The benchmark of the analysis: `python -m benchmarks.fisher [W1 W3 ... big mlp report]`, everything without names.

Each workload runs in a process of its own, against the peers that are installed (the bench extra).
Writes benchmarks/results.json and the first part of benchmarks/README.md; rows that were not asked for stay as they
were.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from typing import Any

from benchmarks import large, table
from benchmarks.measure import Timing, measure
from benchmarks.running import HERE, in_own_process, machine

NAMES = ["W1", "W2", "W2c", "W3", "W3m", "W5", "W5 inverses", "W6", "W6 kept", "W7", "W7 N=100", "ResNet diagonal",
         "ResNet K-FAC", "GPT diagonal", "GPT K-FAC", "big", "mlp", "resnet", "gpt", "report"]  # fmt: skip


def run_one(name: str, peers: bool) -> dict[str, Any]:
    """Measure one workload in this process."""
    if name in large.GOALS:
        return getattr(large, name)()
    from benchmarks import network_peers, networks, workloads
    from benchmarks import peers as public
    from benchmarks.peers import check

    workload = (workloads.WORKLOADS | networks.WORKLOADS)[name]
    case = workload.make()
    ours = measure(lambda: workload.ours(case), case.one_pass, workload.rounds)
    row: dict[str, Any] = {"ours": _numbers(ours), "peers": {}}
    few = case if workload.examples is None else case.few(workload.examples)
    product = workload.product(few, workload.ours(few))
    for peer_name, peer in (public.PEERS | network_peers.PEERS)[name].items() if peers else ():
        if not peer.installed:
            row["peers"][peer_name] = {"why": "not installed"}
            continue
        theirs = case.copy()
        try:
            error = check(few.copy(), peer, product)
            timing = measure(lambda: peer.run(theirs), case.one_pass, 3, wall=False)  # noqa: B023
        except Exception as problem:
            row["peers"][peer_name] = {"why": f"{type(problem).__name__}: {problem}"}
            continue
        row["peers"][peer_name] = _numbers(timing) | {"difference": error, "note": peer.note}
    return row


def _numbers(timing: Timing) -> dict[str, float]:
    numbers = {
        "ms": 1e3 * timing.seconds,
        "pass_ms": 1e3 * timing.forward_backward,
        "x": timing.ratio,
        "gflop": timing.gflop,
    }
    if timing.wall_two_threads is not None:
        numbers["wall_ms_two_threads"] = 1e3 * timing.wall_two_threads
    return numbers


def main() -> None:
    """Measure, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--no-peers", action="store_true", help="measure fisherviz alone, and write nothing")
    parser.add_argument("--here", action="store_true", help="measure one workload in this process, print it as JSON")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"no workload is called {', '.join(unknown)}; they are {', '.join(NAMES)}")
    if arguments.here:
        print(json.dumps(run_one(arguments.names[0], not arguments.no_peers)))
        return
    path = HERE / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    for name in arguments.names or NAMES:
        alone = ["--here", name, "--no-peers"]
        threads = 2 if name in large.GOALS else 1
        row = in_own_process("benchmarks.fisher", alone if arguments.no_peers else alone[:2], threads)
        if name not in large.GOALS:
            row["huge_pages"] = in_own_process("benchmarks.fisher", alone, huge_pages=True)["ours"]
        results["rows"][name] = row | {"measured": datetime.now(UTC).isoformat(timespec="seconds")}
        print(table.line(name, row), flush=True)
        if not arguments.no_peers:  # after every row: a run that is stopped keeps what it measured
            results["rows"] = {known: results["rows"][known] for known in NAMES if known in results["rows"]}
            here = machine()  # rows of before keep their peers' versions
            here["packages"] = results.get("machine", here)["packages"] | here["packages"]
            results["machine"] = here
            table.write_whole(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
            table.write_readme(HERE)


if __name__ == "__main__":
    main()
