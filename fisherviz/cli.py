"""The command `fisherviz`: mounts one function per subcommand, each with an example in its help."""

from __future__ import annotations

from typing import Annotated

import typer

from fisherviz._version import __version__
from fisherviz.commands import data, papers, report_command, sweep, train
from fisherviz.commands.telling import Group, mount

app = typer.Typer(
    name="fisherviz",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
mount(app, report_command.report, report_command.EXAMPLE, shares=True)
mount(app, papers.papers, papers.EXAMPLE)
mount(app, train.train, train.EXAMPLE)
mount(app, sweep.sweep, sweep.EXAMPLE)
app.add_typer(data.app)


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
    """How good is each approximation of the Fisher information matrix on your trained network? Exactly.

    Each command tells its options and an example: fisherviz report --help. After --install-completion the shell
    completes commands, options and the names of methods, metrics, data sets, networks and optimizers.
    """


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
