"""What the defaults reach, as the third part of the page; drawn from saved results alone."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import provenance, table

REMARKS = (
    "K-BFGS is defined for layers without weight sharing alone; convolutions and transformers give it a group with "
    "approximation='none' for those."
)


def part(results: dict[str, Any]) -> list[str]:
    """The paragraphs and tables."""
    rows = results["rows"]
    head = ["optimizer", *(row["title"] for row in rows.values())]
    names = next(iter(rows.values()))["optimizers"]
    return [
        "# What the defaults reach",
        "Written by `python -m benchmarks.defaults`; the numbers are in `defaults.json`. "
        f"{provenance(results['machine'])}",
        "Training loss (mean nll per example, evaluation mode) after three epochs, batch 100: mean of seeds 0, 1 and 2 "
        "of weights and batches, the worst of them in brackets. Every optimizer has its own defaults, and no option is "
        "chosen for a problem or a seed. Bold: worse than Adam's defaults, in the mean or at worst. "
        f"{REMARKS}",
        table(head, [[name, *(_cell(row, name, "defaults") for row in rows.values())] for name in names]),
        "The same with the papers' values (`.paper`, `--defaults paper`), which are those of other networks, batch "
        "sizes and lengths of training, or starts of a search:",
        table(
            head,
            [
                [name, *(_cell(row, name, "paper") for row in rows.values())]
                for name, made in names.items()
                if made["paper"] is not None
            ],
        ),
    ]


def _cell(row: dict[str, Any], name: str, which: str) -> str:
    losses, adam = row["optimizers"][name][which]["losses"], row["optimizers"]["Adam"]["defaults"]["losses"]
    if None in losses:
        undefined = "is not defined" in row["optimizers"][name][which]["why"]
        return "–" if undefined else "**breaks off**"
    mean, worst = sum(losses) / len(losses), max(losses)
    text = f"{mean:.3g} ({worst:.3g})"
    return f"**{text}**" if name != "SGD" and (mean > sum(adam) / len(adam) or worst > max(adam)) else text
