"""`fisherviz papers`: run exhibits of the papers, keep their pictures and claims, print the verdicts.

Heavy imports wait until it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fisherviz.commands.names import EXHIBITS, SCALES, completion
from fisherviz.support.choices import one_of
from fisherviz.support.errors import OptionError, option
from fisherviz.support.files import check_place

if TYPE_CHECKING:
    from fisherviz.papers.claims import Outcome
    from fisherviz.papers.registry import Exhibit

EXAMPLE = "fisherviz papers --only kfac.fig2 --only kfac.fig6 --out figures"


def papers(
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="An exhibit such as kfac.fig2, or a paper such as kfac. May be repeated.",
            show_default="all",
            autocompletion=completion(EXHIBITS),
        ),
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            help="smoke (seconds, digits), desk (minutes) or paper (the full setting).",
            autocompletion=completion(SCALES),
        ),
    ] = "desk",
    seed: Annotated[int, typer.Option(help="Of initial weights and everything else that is random.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for pictures and claims.")] = Path("figures"),
    list_: Annotated[bool, typer.Option("--list", help="Name the exhibits and leave.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars, no table.")] = False,
) -> None:
    """Measure the papers' figures and tables again, and put each claim next to what came out."""
    from fisherviz.papers import registry
    from fisherviz.papers.claims import load
    from fisherviz.training.network import usable

    with option("--only"):
        chosen = registry.chosen(only)
    if list_:
        for one in chosen:
            typer.echo(f"{one.name:16} {one.title}")
        return
    with option("--scale"):
        one_of("scale", scale, registry.SCALES)
    if not 0 <= seed < 2**63:
        raise OptionError(f"--seed: must be from 0 to below 2^63, not {seed}.")
    usable(device)
    with option("--out"):
        check_place(out, directory=True)
        load(out)
    run = registry.Run(scale, seed, device, progress=not quiet)
    for one in chosen:
        outcome = registry.measure(one, run, out)
        if not quiet:
            _show(one, outcome)
    typer.echo(f"Wrote {out / 'claims.md'}")


def _show(one: Exhibit, outcome: Outcome) -> None:
    """The verdicts of an exhibit in the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{one.name}: {one.title}", title_justify="left", show_lines=True)
    for head in ("claim", "paper", "measured", "verdict"):
        table.add_column(head)
    for claim in outcome.claims:
        cells = (claim.statement, claim.paper, claim.measured, claim.verdict)
        table.add_row(*map(escape, cells))
    console = Console()
    console.print(outcome.details, markup=False, highlight=False)
    console.print(table)
