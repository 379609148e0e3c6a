"""`fisherviz report`: its options, and the summary in the terminal; the job itself is in `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fisherviz.commands.telling import told
from fisherviz.support.errors import OptionError

if TYPE_CHECKING:
    from fisherviz.report.page import Section

EXAMPLE = (
    "Example: fisherviz report --model nets.mine:build --weights net.safetensors --data mnist:16 "
    "--methods kfac,ekfac,foof --out report"
)
TERMINAL = (
    "relative_frobenius", "frobenius_cosine", "inverse_frobenius", "direction_cosine", "passes", "bytes",
)  # fmt: skip
"""What of the summary fits into eighty columns."""


def report(
    model: Annotated[
        str | None,
        typer.Option(help="pkg.mod:factory that builds the network; without it the K-FAC paper's is trained."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="The network's weights, .safetensors or a saved state_dict.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A data set (digits, mnist, ...; mnist:16 scales to 16 x 16) or pkg.mod:loader.",
            show_default="digits:16",
        ),
    ] = None,
    likelihood: Annotated[
        str | None, typer.Option(help="categorical, bernoulli or gaussian.", show_default="the data set's own")
    ] = None,
    kind: Annotated[
        str, typer.Option(help="exact (expectation over labels), mc (sampled) or empirical (the data's labels).")
    ] = "exact",
    methods: Annotated[
        str | None, typer.Option(help="Approximations, separated by commas.", show_default="all")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Names of layers, separated by commas.", show_default="all")
    ] = None,
    damping: Annotated[
        float | None, typer.Option(help="Damping of inverses.", show_default="a hundredth of the mean eigenvalue")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of initial weights and sampled labels.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for page, data and pictures.")] = Path("report"),
    examples: Annotated[
        int | None, typer.Option(help="How many of the first training examples to take.", show_default="at most 2000")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars, no table.")] = False,
) -> None:
    """Compare every approximation of the Fisher with the exact one, and write a page about it."""
    from fisherviz.commands.report import Job, run

    with told(hint=" (--data, --examples, --layers and --damping change what is computed.)"):
        job = Job(
            model, weights, data, likelihood, kind, _names("--methods", methods), _names("--layers", layers),
            damping, seed, device, out, examples, quiet,
        )  # fmt: skip
        sections = run(job, say=(lambda line: None) if quiet else typer.echo)
        if not quiet:
            _show(sections)
    typer.echo(f"Wrote {out / 'index.html'}")


def _names(option: str, text: str | None) -> tuple[str, ...] | None:
    """The names in a comma-separated option."""
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise OptionError(f"{option}: give at least one name.")
    return names


def _show(sections: list[Section]) -> None:
    """Verdict and summary of each section in the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fisherviz.report import paragraph, verdict
    from fisherviz.report.tables import layer_tables, summary_table

    console = Console()
    for section in sections:
        shown = summary_table(section.comparison, TERMINAL)
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
