"""What a file of this folder gives: the measurements of one paragraph, what of them must hold, and its words."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, Protocol, cast

from benchmarks.markdown import provenance

HERE = Path(__file__).parent
NAMES: tuple[str, ...] = (
    "catalogue",
    "programs",
    "passes",
    "numerics",
    "durability",
    "security",
    "memory",
    "endurance",
    "mutants",
)
"""The files, in the order of the page."""


class Paragraph(Protocol):
    """A file of this folder."""

    TITLE: str
    """Its heading on the page."""

    def measure(self, long: bool) -> dict[str, Any]:
        """What JSON holds; `long` is the whole, which may take hours, otherwise a few minutes of the same kind."""

    def broken(self, found: dict[str, Any]) -> list[str]:
        """A sentence for everything that was measured and must not be; empty where all holds."""

    def words(self, found: dict[str, Any]) -> list[str]:
        """Paragraphs and tables of Markdown, every figure of them from what was measured."""


def paragraph(name: str) -> Paragraph:
    """The file of that name."""
    return cast(Paragraph, importlib.import_module(f"benchmarks.trust.{name}"))


def kept(name: str, folder: Path = HERE) -> dict[str, Any]:
    """What was measured and committed; empty where nothing was."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def page(folder: Path = HERE) -> str:
    """The page of all paragraphs from what is kept: the whole measurement where there is one, else the short one."""
    parts = []
    for name in NAMES:
        halves = kept(name, folder)
        if not halves:
            continue
        half = "long" if "long" in halves else "short"
        command = f"python -m benchmarks.trust {name}" + (" --long" if half == "long" else "")
        entry = halves[half]
        module = paragraph(name)
        how = "in parts of" if entry["found"].get("aside") else "by"  # the aside says which
        parts += [
            f"## {module.TITLE}",
            *module.words(entry["found"]),
            f"Measured {entry['measured'][:10]} {how} `{command}`. {provenance(entry['machine'])}",
        ]
    return "\n\n".join(parts) + "\n"
