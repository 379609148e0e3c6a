"""`fisherviz papers`: run exhibits of the papers, keep their pictures and claims, print the verdicts.

Heavy imports wait until it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fisherviz.commands import names
from fisherviz.commands.names import completion
from fisherviz.commands.terminal import tell
from fisherviz.support.choices import one_of
from fisherviz.support.errors import OptionError, option
from fisherviz.support.files import check_place

if TYPE_CHECKING:
    from fisherviz.papers.ledger.claims import Outcome
    from fisherviz.papers.ledger.registry import Exhibit
    from fisherviz.papers.trials.work import Run

EXAMPLE = "fisherviz papers --only kfac.fig2 --only kfac.fig6 --out figures"


def papers(
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="An exhibit such as kfac.fig2, or a paper such as kfac. May be repeated.",
            show_default="all",
            autocompletion=completion(names.EXHIBITS),
        ),
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            help="smoke (seconds, digits), desk (minutes) or paper (the full setting).",
            autocompletion=completion(names.SCALES),
        ),
    ] = "desk",
    seed: Annotated[int, typer.Option(help="Of initial weights and everything else that is random.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for pictures and claims.")] = Path("figures"),
    jobs: Annotated[int, typer.Option(help="Processes that measure side by side.")] = 1,
    list_: Annotated[bool, typer.Option("--list", help="Name the exhibits and leave.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars, no table.")] = False,
) -> None:
    """Measure the papers' figures and tables again, and put each claim next to what came out."""
    from fisherviz.papers.ledger import registry
    from fisherviz.papers.ledger.records import load
    from fisherviz.papers.trials.work import SCALES
    from fisherviz.papers.trials.work import Run as Running
    from fisherviz.training.network import usable

    with option("--only"):
        chosen = registry.chosen(only)
    if list_:
        for one in chosen:
            tell(f"{one.name:18} {one.paper}, {one.title}")
        return
    with option("--scale"):
        one_of("scale", scale, SCALES)
    if not 0 <= seed < 2**63:
        raise OptionError(f"--seed: must be from 0 to below 2^63, not {seed}.")
    if jobs < 1:
        raise OptionError(f"--jobs: must be at least 1, not {jobs}.")
    usable(device)
    with option("--out"):
        check_place(out, directory=True)
        load(out)
    run = Running(scale, seed, device, jobs, progress=not quiet)
    if not quiet:
        _announce(chosen, run)
    for one in chosen:
        outcome = registry.measure(one, run, out)
        if not quiet:
            _show(one, outcome)
    tell(f"Wrote {out / 'claims.md'}")


def _announce(chosen: list[Exhibit], run: Run) -> None:
    """How long it takes, before it starts."""
    hours = sum(one.hours[run.scale] for one in chosen)
    if hours:
        count = "1 exhibit" if len(chosen) == 1 else f"{len(chosen)} exhibits"
        shared = f", about {hours / run.jobs:.2g} hours in {run.jobs} processes" if run.jobs > 1 else ""
        tell(
            f"{count} at scale {run.scale}: about {hours:.2g} core-hours{shared}, less what is kept already; "
            "an interrupted command goes on where it was."
        )


def _show(one: Exhibit, outcome: Outcome) -> None:
    """The verdicts of an exhibit in the terminal: whatever its width, a claim is read from the verdict down."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    from fisherviz.papers.ledger.claims import NOT_REPRODUCED, REPRODUCED

    colors = {REPRODUCED: "bold green", NOT_REPRODUCED: "bold red"}
    console = Console(highlight=False, emoji=False)
    console.print(Text(f"\n{one.name}: {one.paper}, {one.title}", "bold"))
    for claim in outcome.claims:
        console.print(Text.assemble((claim.verdict, colors.get(claim.verdict, "bold yellow")), f": {claim.statement}"))
        lines = [f"paper: {claim.paper}", f"measured: {claim.measured}", f"rule: {claim.rule}"]
        lines += [f"setting: {'; '.join(claim.departures)}"] if claim.departures else []
        console.print(Padding(Text("\n".join(lines)), (0, 0, 0, 4)))
