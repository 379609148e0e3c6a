"""Sums over examples that a pass feeds: what an approximation names in `statistics(layer)`."""

from fisherviz.statistics.base import SETTINGS, RowsStatistic, Setting, Statistic, add_up, update_all
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

__all__ = [
    "SETTINGS",
    "Block",
    "CrossInputFactor",
    "CrossOutputFactor",
    "Diagonal",
    "EigenMoment",
    "GradientSum",
    "InputFactor",
    "OutputFactor",
    "OutputSquares",
    "RowsStatistic",
    "Setting",
    "Statistic",
    "UnitBlocks",
    "add_up",
    "update_all",
]
