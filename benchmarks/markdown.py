"""What both parts of the page use: tables of Markdown, the machine in words, the best of several peers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def table(head: list[str], body: list[list[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in body])


def provenance(machine: dict[str, Any]) -> str:
    """What was measured on."""
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    return f"{machine['cores']} CPU cores, Python {machine['python']}, {packages}."


def best_peer(row: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The fastest peer that runs and agrees."""
    ran = {name: peer for name, peer in row["peers"].items() if "ms" in peer}
    return min(ran.items(), key=lambda item: item[1]["x"]) if ran else None


def profiled(
    rows: Mapping[str, Any], goals: Mapping[str, tuple[float | None, str]], said: Mapping[str, str]
) -> list[str]:
    """What a profile says of each goal that is missed.

    Args:
        rows: the measurements by name.
        goals: each row's goal and its unit.
        said: what is known, by name.
    """
    missed = [
        f"* **{name}**: {said[name]}."
        for name, (goal, unit) in goals.items()
        if name in rows and name in said and goal is not None and rows[name]["ours"][unit] > goal
    ]
    return ["Where a goal is missed, by profiles of one thread:", "\n".join(missed)] if missed else []
