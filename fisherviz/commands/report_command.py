"""`fisherviz report`: its options, and the summary in the terminal; the job itself is in `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fisherviz.commands.flags import with_flags
from fisherviz.commands.job import Job
from fisherviz.support.errors import option

if TYPE_CHECKING:
    from fisherviz.report.section import Section

EXAMPLE = (
    "Example: fisherviz report --model nets.mine:build --weights net.safetensors --data mnist:16 "
    "--methods kfac,ekfac,foof --out report"
)


@with_flags(Job, hint=" (--data, --examples, --layers and --damping change what is computed.)")
def report(
    fields: dict[str, Any],
    against: Annotated[
        Path | None,
        typer.Option(help="Folder of an earlier report: against.html beside the page shows what changed since."),
    ] = None,
) -> None:
    """Compare every approximation of the Fisher with the exact one, and write a page about it.

    Started by `torchrun --nproc-per-node=3 -m fisherviz report ...`, three processes share the work.
    """
    from fisherviz.commands.launched import launched
    from fisherviz.commands.report import run

    job = Job(**fields)
    if against is not None:
        from fisherviz.report import compare_reports, comparisons_of

        with option("--against"):
            earlier = comparisons_of(against)  # before the work, and before it may be replaced
    with launched(job.device) as (processes, device):
        job = job.model_copy(update={"device": device})
        quiet = job.quiet and not job.plan
        sections = run(job, (lambda line: None) if quiet else typer.echo, processes)
    if processes.rank > 0 or job.plan:
        return
    if not job.quiet:
        _show(sections)
    typer.echo(f"Wrote {job.out / 'index.html'}")
    if against is not None:
        with option("--against"):
            page = compare_reports(earlier, job.out, job.out / "against.html", names=_names(against, job.out))
        typer.echo(f"Wrote {page}")


def _names(against: Path, out: Path) -> tuple[str, str]:
    """What the two reports are called: their folders, by as much of their paths as tells them apart."""
    one, other = against.resolve().parts, out.resolve().parts
    if one == other:
        return "before", "now"
    least = next(k for k in range(1, max(len(one), len(other)) + 1) if one[-k:] != other[-k:])
    return str(Path(*one[-least:])), str(Path(*other[-least:]))


def _show(sections: list[Section]) -> None:
    """Verdict and summary of each section in the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fisherviz.report import paragraph, verdict
    from fisherviz.report.tables import layer_tables, summary_table
    from fisherviz.results.metrics import BRIEF

    console = Console()
    for section in sections:
        shown = summary_table(section.comparison, BRIEF)
        if shown is None:
            shown = next(iter(layer_tables(section.comparison)), None)
        if shown is not None:
            title = section.title if shown.groups else f"{section.title}. {shown.caption}"
            console.print(title, markup=False, highlight=False)
            table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
            table.add_column(shown.corner, no_wrap=True)
            for head in shown.heads:
                table.add_column("\n".join(escape(head).split()), justify="right")
            for name, cells in shown.rows:
                texts = (f"[bold]{escape(c.text)}[/]" if c.best else escape(c.text) for c in cells)
                table.add_row(escape(name), *texts)
            console.print(table)
        words = paragraph(verdict(section.comparison))
        console.print(words, markup=False, highlight=False, soft_wrap=False)
        console.print()
