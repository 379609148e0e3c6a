"""`fisherviz train`: a run from flags or a YAML file; the same command again continues it.

What goes wrong is told in one sentence: exit code 2 for an option, 1 for a run that could not go on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm.auto import tqdm

from fisherviz.training.config import make_config, read_config
from fisherviz.training.flags import with_flags

EXAMPLE = (
    "Example: fisherviz train --dataset digits --model kfac-mlp --optimizer foof -O lr=0.3 -O damping=1 "
    "--epochs 10 "
    "--seed 0 --out runs/foof"
)


def _train(
    fields: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="YAML file of fields, named as these options are; options come first.")
    ] = None,
) -> None:
    """Train a network: metrics, checkpoints and summary in a folder; the same command again continues."""
    from fisherviz.training.run import train as run

    made = make_config(read_config(config) if config is not None else {}, fields)
    done = run(made, say=None if made.quiet else tqdm.write)
    typer.echo(f"Wrote {done.path}")


train = with_flags(_train)
train.__name__ = "train"
