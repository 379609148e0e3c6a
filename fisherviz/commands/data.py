"""`fisherviz data`: which of the papers' data sets are at hand, fetching them, checking their files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fisherviz.commands.names import DATASETS, completion
from fisherviz.commands.telling import Group, mount
from fisherviz.commands.terminal import tell
from fisherviz.support.errors import OptionError

if TYPE_CHECKING:
    from fisherviz.datasets.locate import Source

LIST_EXAMPLE = "fisherviz data list"
FETCH_EXAMPLE = "fisherviz data fetch mnist fashion-mnist"
CHECK_EXAMPLE = "FISHERVIZ_DATA=~/data fisherviz data check mnist"

app = typer.Typer(
    name="data",
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"Example: {LIST_EXAMPLE}",
)


@app.callback()
def _top() -> None:
    """List, fetch and check the papers' data sets."""


def list_() -> None:
    """List the data sets: examples, size of their files, where they were found, licence and source.

    They are looked for in the folder that FISHERVIZ_DATA names, then in the user's cache.
    """
    from fisherviz import datasets
    from fisherviz.commands.terminal import Column, print_table
    from fisherviz.datasets.locate import VARIABLE, cache_directory, given_directory
    from fisherviz.support.numbers import human

    given, cache = given_directory(), cache_directory()
    sources = [datasets.source(name) for name in datasets.names()]
    found = [_where(name) for name in datasets.names()]
    print_table(
        [
            Column("name", datasets.names(), right=False),
            Column("examples", [f"{datasets.examples(name):,}" for name in datasets.names()], importance=4),
            Column("size", [human(one.size) if one else "" for one in sources], importance=3),
            Column("found in", found, importance=5, right=False),
            Column("licence", [one.licence if one else "" for one in sources], importance=2, right=False),
            Column("source", [one.origin if one else "" for one in sources], importance=1, right=False),
        ],
        elsewhere="a wider terminal shows them",
    )
    tell(f"{VARIABLE}: {given or 'not set'}; cache: {cache}")


def _where(name: str) -> str:
    from fisherviz import datasets
    from fisherviz.datasets.locate import VARIABLE, given_directory

    if datasets.source(name) is None:
        return "embedded" if name == "digits" else "generated"
    folder = datasets.where(name)
    return "missing" if folder is None else VARIABLE if folder == given_directory() else "cache"


Names = Annotated[list[str], typer.Argument(metavar="NAME", help="Data sets.", autocompletion=completion(DATASETS))]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars, nothing but errors.")]


def fetch(names: Names, quiet: Quiet = False) -> None:
    """Download data sets into the user's cache, whole or not at all; those at hand are left alone."""
    from fisherviz import datasets
    from fisherviz.datasets.locate import cache_directory, locate

    for name, source in zip(names, map(_source, names), strict=True):
        folder = datasets.where(name)
        if source is None:
            told = f"{name} is {_where(name)} and needs no files."
        elif folder is not None:
            told = f"{name} is at hand in {folder}."
        else:
            locate(source, progress=not quiet)
            told = f"Wrote {name} to {cache_directory()}"
        if not quiet:
            tell(told)


def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]", help="Data sets; those at hand unless given.", autocompletion=completion(DATASETS)
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Read data sets, compare their files with the published ones; exit code 1 if one is missing or damaged."""
    from fisherviz import datasets

    for name in names or ():
        _source(name)
    wrong = []
    for name in names or [name for name in datasets.names() if _where(name) != "missing"]:
        try:
            found = datasets.check(name)
        except (ValueError, RuntimeError) as error:
            wrong.append(name)
            tell(f"{name}: {error}", err=True)
        else:
            if not quiet:
                tell(f"{name}: {found}.")
    if wrong:
        raise typer.Exit(1)


def _source(name: str) -> Source | None:
    from fisherviz import datasets

    try:
        return datasets.source(name)
    except ValueError as error:
        raise OptionError(str(error)) from error


mount(app, list_, LIST_EXAMPLE, name="list")
mount(app, fetch, FETCH_EXAMPLE)
mount(app, check, CHECK_EXAMPLE)
