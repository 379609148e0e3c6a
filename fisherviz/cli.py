"""The command `fisherviz`: one function per subcommand, each with an example in its help.

What goes wrong is told in one sentence that names the option to change: exit code 2 for an option, else 1.
Heavy imports wait until a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from fisherviz._version import __version__
from fisherviz.commands import papers as papers_command
from fisherviz.commands import train as training_command

if TYPE_CHECKING:
    from fisherviz.report.page import Section

TERMINAL = (
    "relative_frobenius", "frobenius_cosine", "inverse_frobenius", "direction_cosine", "passes", "bytes",
)  # fmt: skip
"""What of the summary fits into eighty columns."""

app = typer.Typer(
    name="fisherviz",
    help="How good is each approximation of the Fisher information matrix on your trained network? Exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _Command(TyperCommand):
    """A command that answers an unknown option with the nearest one alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if near := getattr(error, "possibilities", None):
                given = str(getattr(error, "option_name", ""))
                error.possibilities = difflib.get_close_matches(given, near, n=1, cutoff=0.0)  # type: ignore[attr-defined]
            raise


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fisherviz {__version__}")
        raise typer.Exit()


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """How good is each approximation of the Fisher information matrix on your trained network? Exactly."""


@app.command(
    cls=_Command,
    epilog="Example: fisherviz report --model nets.mine:build --weights net.safetensors --data mnist:16 "
    "--methods kfac,ekfac,foof --out report",
)
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
        str | None,
        typer.Option(help="categorical, bernoulli or gaussian.", show_default="the data set's own"),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(help="exact (expectation over labels), mc (sampled) or empirical (the data's labels)."),
    ] = "exact",
    methods: Annotated[
        str | None, typer.Option(help="Approximations, separated by commas.", show_default="all")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Names of layers, separated by commas.", show_default="all")
    ] = None,
    damping: Annotated[
        float | None,
        typer.Option(help="Damping of inverses.", show_default="a hundredth of the mean eigenvalue"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of initial weights and sampled labels.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for page, data and pictures.")] = Path("report"),
    examples: Annotated[
        int | None,
        typer.Option(help="How many of the first training examples to take.", show_default="at most 2000"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars, no table.")] = False,
) -> None:
    """Compare every approximation of the Fisher with the exact one, and write a page about it."""
    try:
        from fisherviz.commands.report import Job, run

        job = Job(
            model, weights, data, likelihood, kind, _names("--methods", methods), _names("--layers", layers),
            damping, seed, device, out, examples, quiet,
        )  # fmt: skip
        sections = run(job, say=(lambda line: None) if quiet else typer.echo)
        if not quiet:
            _show(sections)
        typer.echo(f"Wrote {out / 'index.html'}")
    except (ValueError, TypeError, RuntimeError, MemoryError, OSError, ImportError) as error:
        _fail(error)


def _names(option: str, text: str | None) -> tuple[str, ...] | None:
    """The names in a comma-separated option."""
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise typer.BadParameter("give at least one name.", param_hint=option)
    return names


def _fail(error: BaseException) -> NoReturn:
    """Tell in one sentence what went wrong, and leave with 2 if an option is to blame, with 1 otherwise."""
    from fisherviz.commands.inputs import OptionError, one_sentence

    if os.environ.get("FISHERVIZ_TRACEBACK"):
        raise error
    told = one_sentence(str(error)) or type(error).__name__
    blamed = isinstance(error, OptionError)
    hint = "" if blamed else " (--data, --examples, --layers and --damping change what is computed.)"
    typer.echo(f"fisherviz: {told}{hint}", err=True)
    raise typer.Exit(2 if blamed else 1) from None


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


app.command(cls=_Command, epilog=papers_command.EXAMPLE)(papers_command.papers)
app.command(cls=_Command, epilog=training_command.EXAMPLE)(training_command.train)
app.command(cls=_Command, epilog=training_command.SWEEP_EXAMPLE)(training_command.sweep)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
