"""What the defaults reach, as the third part of the page; drawn from saved results alone."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import provenance, table

KBFGS = (
    "K-BFGS is defined for layers without weight sharing alone; convolutions and transformers give it a group with "
    "approximation='none' for those."
)

LONGER = (
    "Rates are constant: they are for the first epochs, and where data are noisy and batches small a schedule has to "
    "follow, as with SGD. After 40 epochs of the house prices (seed 0) Adam's 0.045 is below KFAC's 0.070, plain "
    "KFAC's 0.075, EKFAC's 0.047, FOOF's 0.067, CWNGD's 0.057 and TENGraD's 0.052; after 40 epochs of the digits its "
    "0.10 is above all of theirs (0.0002 to 0.017)."
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
        f"{KBFGS}",
        table(head, [[name, *(_cell(row, name, "defaults") for row in rows.values())] for name in names]),
        LONGER,
        "The same with the papers' values (`.paper`, `--defaults paper`), which are those of other networks, batch "
        "sizes and lengths of training, or starts of a search:",
        table(
            head,
            [
                [name, *(_cell(row, name, "paper") for row in rows.values())]
                for name in names
                if any("paper" in row["optimizers"][name] for row in rows.values())
            ],
        ),
    ]


def _cell(row: dict[str, Any], name: str, which: str) -> str:
    found, adam = row["optimizers"][name].get(which), row["optimizers"]["Adam"]["defaults"]["losses"]
    if found is None:
        return "not measured"
    losses = found["losses"]
    if None in losses:
        return "–" if "is not defined" in found["why"] else "**breaks off**"
    mean, worst = sum(losses) / len(losses), max(losses)
    text = f"{mean:.3g} ({worst:.3g})"
    return f"**{text}**" if name != "SGD" and (mean > sum(adam) / len(adam) or worst > max(adam)) else text
