"""How much the tests of the core notice: planted faults, mutants, branches, and tests that hear nothing."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import table
from benchmarks.running import in_own_process
from benchmarks.trust import mutants_sampled

TITLE = "Mutants and branches"
LEAST_KILLED, LEAST_TAKEN = 0.85, 0.95


def measure(long: bool) -> dict[str, Any]:
    """Planted faults each time; mutants, branches and deaf tests where it may take long."""
    found: dict[str, Any] = {"planted": in_own_process("benchmarks.trust.mutants_planted", [])}
    if long:
        found |= mutants_sampled.mutants() | {"branches": mutants_sampled.coverage()}
    return found


def broken(found: dict[str, Any]) -> list[str]:
    """Faults that no test notices, too few mutants killed, too few branches taken."""
    said = [f"no test notices that {words}" for words, noticed in found["planted"].items() if not noticed]
    for room, counts in found.get("mutants", {}).items():
        said += [f"{where}: `{was}` → `{now}` survives and is not explained" for where, was, now in counts["open"]]
        if share(counts) < LEAST_KILLED:
            said.append(f"{share(counts):.0%} of the mutants of {room} are killed, less than {LEAST_KILLED:.0%}")
    for room, counts in found.get("branches", {}).items():
        taken, of = counts["branches"]
        if taken < LEAST_TAKEN * of:
            said.append(f"{taken} of {of} branches of {room} are taken, less than {LEAST_TAKEN:.0%}")
    said += [
        f"{test} passes though every function of the core raises" for test in found.get("deaf", {}).get("pass", ())
    ]
    return said


def share(counts: dict[str, Any]) -> float:
    """Of the mutants that can be killed at all, as first measured: those that were killed since are none of them."""
    return (counts["killed"]) / max(1, counts["tried"] - counts["explained"])


def words(found: dict[str, Any]) -> list[str]:
    """A paragraph and a table."""
    planted = found["planted"]
    said = [
        f"{len(planted)} faults are planted in the package one at a time, among them those that its tests once did not "
        f"notice and others whose numbers look right (a π upside down, tiles that replace one another, a factor √K); "
        f"{sum(planted.values())} make the test fail that is named beside each in "
        "`benchmarks/trust/mutants_planted.py`."
    ]
    if "mutants" not in found:
        return said
    counts = found["mutants"]
    tried, killed, since, explained = (
        sum(room[what] for room in counts.values()) for what in ("tried", "killed", "since", "explained")
    )
    said += [
        f"mutmut makes {sum(room['mutants'] for room in counts.values()):,} mutants of the functions of the "
        f"mathematical core (not of decorated ones such as properties, which it leaves out). Of a random sample of "
        f"{tried}, drawn room by room with the seed {mutants_sampled.SEED}, {killed} were killed by the "
        f"core's tests, {mutants_sampled.SECONDS} s of them at most for each, when they were first tried; {since} of "
        f"the others are killed by "
        f"tests written since, and {explained} change nothing that can be seen or only speed or wording, and are "
        "listed with the reason in `benchmarks/trust/survivors.md`.",
        table(
            ["room", "mutants", "tried", "killed at first", "killed since", "explained", "open"],
            [
                [
                    f"`{room}`", f"{own['mutants']:,}",
                    *(str(own[what]) for what in ("tried", "killed", "since", "explained")), str(len(own["open"])),
                ]
                for room, own in counts.items()
            ],
        ),
    ]  # fmt: skip
    if taken := found.get("branches"):
        said.append(
            table(
                ["room", "branches taken", "lines run"],
                [[f"`{room}`", percent(own["branches"]), percent(own["lines"])] for room, own in taken.items()],
            )
        )
    if deaf := found.get("deaf"):
        said.append(
            f"While every function that mutmut can mutate raises, {deaf['tests'] - len(deaf['pass']):,} of "
            f"{deaf['tests']:,} tests of the core's rooms fail."
        )
    return said + ([found["aside"]] if "aside" in found else [])


def percent(counts: list[int]) -> str:
    """How many of how many."""
    part, whole = counts
    return f"{100 * part / max(1, whole):.1f} %"
