"""Sums over examples that a pass feeds: what an approximation names in `statistics(layer)`."""

from fisherviz.statistics.base import SETTINGS, RowsStatistic, Setting, Statistic, add_up, needs_slopes, update_all
from fisherviz.statistics.moments import (
    Block,
    CrossInputFactor,
    CrossOutputFactor,
    Diagonal,
    EigenMoment,
    GradientSum,
    InputFactor,
    OutputFactor,
    OutputSquares,
    UnitBlocks,
)
from fisherviz.statistics.recursion import Misfit, NextWeight, SlopeMoment

__all__ = [
    "SETTINGS",
    "Block",
    "CrossInputFactor",
    "CrossOutputFactor",
    "Diagonal",
    "EigenMoment",
    "GradientSum",
    "InputFactor",
    "Misfit",
    "NextWeight",
    "OutputFactor",
    "OutputSquares",
    "RowsStatistic",
    "Setting",
    "SlopeMoment",
    "Statistic",
    "UnitBlocks",
    "add_up",
    "needs_slopes",
    "update_all",
]
