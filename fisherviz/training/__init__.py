"""Training runs that can be stopped at any moment and continued bit for bit: `train`, `Config`."""

from fisherviz.results.run import Run, load_run
from fisherviz.training.baselines import Nesterov
from fisherviz.training.config import Config
from fisherviz.training.diagnosis import NonFiniteLoss, StoppedRun
from fisherviz.training.run import train
from fisherviz.training.sweep import Sweep, sweep

__all__ = ["Config", "Nesterov", "NonFiniteLoss", "Run", "StoppedRun", "Sweep", "load_run", "sweep", "train"]
