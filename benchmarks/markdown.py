"""What both parts of the page use: tables of Markdown, the machine in words, the best of several peers."""

from __future__ import annotations

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
