"""`fisherviz report`: its options, and the summary in the terminal; the job itself is in `report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fisherviz.commands.flags import with_flags
from fisherviz.commands.job import Job
from fisherviz.commands.terminal import Column, print_table, say, tell
from fisherviz.results.metrics import BRIEF
from fisherviz.support.errors import OptionError, option

if TYPE_CHECKING:
    from fisherviz.report.section import Section

EXAMPLE = (
    "fisherviz report --model nets.mine:build --weights net.safetensors --data mnist:16 "
    "--methods kfac,ekfac,foof --out report"
)

IMPORTANT = ("relative_frobenius", "direction_cosine", "passes", "frobenius_cosine", "inverse_frobenius", "bytes")
"""Metrics that keep their columns longest in a narrow terminal."""
TABLE = "comparison.parquet"


@with_flags(Job, from_files=False)
def report(
    fields: dict[str, Any],
    against: Annotated[
        Path | None,
        typer.Option(help="Folder of an earlier report: against.html beside the page shows what changed since."),
    ] = None,
) -> None:
    """Compare every approximation of the Fisher with the exact one, and write a page about it.

    With --compare-only there is no page: fv.load_comparison reads the numbers out of the folder.

    Interrupted, the same command goes on with what it had finished.

    Started by torchrun --nproc-per-node=3 -m fisherviz report ..., three processes share the work.
    """
    from fisherviz.commands.launched import launched
    from fisherviz.commands.report import run

    job = Job(**fields)
    if against is not None:
        if job.compare_only:
            raise OptionError("--against: it makes a page, and --compare-only none; leave one of them out.")
        from fisherviz.report import compare_reports, comparisons_of

        with option("--against"):
            earlier = comparisons_of(against)  # before the work, and before it may be replaced
    with launched(job.device) as (processes, device):
        job = job.model_copy(update={"device": device})
        quiet = job.quiet and not job.plan
        sections = run(job, (lambda line: None) if quiet else say, processes)
    if processes.rank > 0 or job.plan:
        return
    written = job.out / (TABLE if job.compare_only else "index.html")
    if not job.quiet:
        _show(sections, job.metrics or BRIEF, f"{written} has them")
    tell(f"Wrote {written}")
    if against is not None:
        with option("--against"):
            page = compare_reports(earlier, job.out, job.out / "against.html", names=_names(against, job.out))
        tell(f"Wrote {page}")


def _names(against: Path, out: Path) -> tuple[str, str]:
    """What the two reports are called: their folders, by as much of their paths as tells them apart."""
    one, other = against.resolve().parts, out.resolve().parts
    if one == other:
        return "before", "now"
    least = next(k for k in range(1, max(len(one), len(other)) + 1) if one[-k:] != other[-k:])
    return str(Path(*one[-least:])), str(Path(*other[-least:]))


def _show(sections: list[Section], metrics: Sequence[str], elsewhere: str) -> None:
    """Verdict and summary of each section in the terminal."""
    from fisherviz.report import paragraph, verdict
    from fisherviz.report.tables import layer_tables, summary_table

    importance = {name: len(IMPORTANT) - rank for rank, name in enumerate(IMPORTANT)}
    for section in sections:
        shown = summary_table(section.comparison, metrics)
        if shown is None:
            shown = next(iter(layer_tables(section.comparison)), None)
        if shown is not None:
            columns = [Column(shown.corner, [name for name, _ in shown.rows], right=False)]
            for k, (head, name) in enumerate(zip(shown.heads, shown.names or shown.heads, strict=True)):
                cells = [cells[k] for _, cells in shown.rows]
                best = frozenset(row for row, cell in enumerate(cells) if cell.best)
                columns.append(Column(head, [cell.text for cell in cells], best, importance.get(name, 0)))
            title = section.title if shown.groups else f"{section.title}. {shown.caption}"
            print_table(columns, title, elsewhere)
        if words := paragraph(verdict(section.comparison)):
            say(f"{words}\n")
