"""`fisherviz sweep`: many runs from flags or a YAML file; the same command again, or elsewhere, goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fisherviz.commands.flags import assignments, with_flags
from fisherviz.commands.names import COMPLETED, MODELS, PRESETS, SAMPLERS, completion
from fisherviz.commands.terminal import Column, print_table, tell
from fisherviz.support.errors import OptionError
from fisherviz.training.config import Config, read_config

if TYPE_CHECKING:
    from fisherviz.training.sweep import Sweep

EXAMPLE = (
    "fisherviz sweep --optimizer foof --over lr=[0.1,0.3,1] --over damping=1e-3..1e1 --sampler tpe "
    "--trials 20 --epochs 5 --out sweeps/foof"
)


@with_flags(Config, COMPLETED | {"model": MODELS})
def sweep(
    fields: dict[str, Any],
    config: Annotated[Path | None, typer.Option(help="YAML file of fields that stay the same.")] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES",
            help="What is varied, lr=[0.1,1] or lr=1e-3..1e1: any field or option of the optimizer. May be repeated.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="A grid: benzing, benzing-sgd or benzing-adam.", autocompletion=completion(PRESETS)),
    ] = None,
    sampler: Annotated[str, typer.Option(help="grid, random or tpe.", autocompletion=completion(SAMPLERS))] = "grid",
    trials: Annotated[int, typer.Option(help="Points of random and tpe.")] = 20,
    metric: Annotated[
        str | None,
        typer.Option(help="Of the final evaluation, such as validation_accuracy.", show_default="train_loss"),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs per point; judged by their mean.")] = 1,
    storage: Annotated[
        str | None, typer.Option(help="postgresql://... for many machines.", show_default="SQLite in the folder")
    ] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study.", show_default="the folder's")] = None,
    heartbeat: Annotated[int, typer.Option(help="Seconds between a worker's signs of life.")] = 10,
) -> None:
    """Train over a grid or at sampled points, and rank them; the same command again, or elsewhere, goes on."""
    from fisherviz.plotting.sweeps import sweep_picture
    from fisherviz.support import files
    from fisherviz.training.space import field_name
    from fisherviz.training.sweep import sweep as run

    varied = assignments("--over", over or [])
    for name in map(field_name, varied):
        group, dot, option = name.partition(".")
        if (option in (fields.get(group) or {})) if dot else name in fields:
            raise OptionError(f"--over: {name} is varied, and given by a flag as well; leave one of them out.")
    fields = (read_config(config) if config is not None else {}) | fields
    out, quiet = Path(fields.pop("out", "sweeps/sweep")), fields.pop("quiet", False)
    found = run(
        fields, varied, preset=preset, sampler=sampler, trials=trials, metric=metric,
        seeds=seeds, out=out, storage=storage, study=study, heartbeat=heartbeat, say=None if quiet else tell,
    )  # fmt: skip
    table, picture = found.files
    files.write_whole(picture, sweep_picture(found))
    if not quiet:
        _show(found)
    tell(f"Wrote {table} and {picture}")


def _show(found: Sweep) -> None:
    """The best ten in the terminal."""
    best = [row for _, row in found.table.head(10).iterrows()]
    values = ["stopped" if row["stopped"] else f"{row['value']:.4g}" for row in best]
    spreads = ["" if row["low"] == row["high"] else f"{row['low']:.4g}..{row['high']:.4g}" for row in best]
    columns = [
        Column(found.metric, values),
        Column("range", spreads, importance=1),
        *(Column(name.split(".")[-1], [str(row[name]) for row in best], importance=3) for name in found.varied),
        Column("seconds", [f"{row['seconds']:.2f}" for row in best], importance=2),
    ]
    print_table(columns, f"best of {len(found.table)} by {found.metric}", f"{found.files[0]} has them")
