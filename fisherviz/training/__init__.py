"""Training runs that can be stopped at any moment and continued bit for bit: `train`, `Config`.

For loops of one's own: `Batches` that grow, and the iterate's `Average`, as in section 13 of the K-FAC paper.
"""

from typing import TYPE_CHECKING

from fisherviz.support.lazily import lazily

if TYPE_CHECKING:
    from fisherviz.results.run import Run, load_run
    from fisherviz.training.baselines import Nesterov
    from fisherviz.training.config import Config
    from fisherviz.training.data import Batches
    from fisherviz.training.diagnosis import NonFiniteLoss, StoppedRun
    from fisherviz.training.evaluation import Average
    from fisherviz.training.run import train
    from fisherviz.training.sweep import Sweep, sweep

__all__ = ["Average", "Batches", "Config", "Nesterov", "NonFiniteLoss", "Run", "StoppedRun", "Sweep", "load_run", "sweep", "train"]

# the fields of a run are the command line's options, whose help does not wait for torch
lazily(
    __name__,
    {
        "fisherviz.results.run": ("Run", "load_run"),
        "fisherviz.training.baselines": ("Nesterov",),
        "fisherviz.training.config": ("Config",),
        "fisherviz.training.data": ("Batches",),
        "fisherviz.training.diagnosis": ("NonFiniteLoss", "StoppedRun"),
        "fisherviz.training.evaluation": ("Average",),
        "fisherviz.training.run": ("train",),
        "fisherviz.training.sweep": ("Sweep", "sweep"),
    },
)
