"""`fisherviz train`: from flags or a YAML file; the same command again continues."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fisherviz.commands.flags import with_flags
from fisherviz.commands.names import COMPLETED, MODELS
from fisherviz.commands.terminal import tell
from fisherviz.support.names import visible
from fisherviz.training.config import Config, make_config, read_config

EXAMPLE = (
    "fisherviz train --dataset digits --model kfac-mlp --optimizer foof -O lr=0.3 -O damping=1 "
    "--epochs 10 --seed 0 --out runs/foof"
)


@with_flags(Config, COMPLETED | {"model": MODELS})
def train(
    fields: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="YAML file of fields, named as these options are; options come first.")
    ] = None,
) -> None:
    """Train a network: metrics, checkpoints and summary in a folder; the same command again continues."""
    from tqdm.auto import tqdm

    from fisherviz.plotting.pictures import run_pictures
    from fisherviz.support import files
    from fisherviz.training.run import train as run

    made = make_config(read_config(config) if config is not None else {}, fields)
    done = run(made, say=None if made.quiet else lambda line: tqdm.write(visible(line)))
    for name, picture in run_pictures(done).items():
        files.write_whole(done.path / name, picture)
    tell(f"Wrote {done.path}")
