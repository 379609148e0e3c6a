"""The command `fisherviz`: mounts one function per subcommand, each with an example in its help."""

from __future__ import annotations

from typing import Annotated

import typer

from fisherviz._version import __version__
from fisherviz.commands import papers, report_command, sweep, train
from fisherviz.commands.telling import Command

app = typer.Typer(
    name="fisherviz",
    help="How good is each approximation of the Fisher information matrix on your trained network? Exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=Command, epilog=report_command.EXAMPLE)(report_command.report)
app.command(cls=Command, epilog=papers.EXAMPLE)(papers.papers)
app.command(cls=Command, epilog=train.EXAMPLE)(train.train)
app.command(cls=Command, epilog=sweep.EXAMPLE)(sweep.sweep)


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


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
