"""Sums over examples that a pass feeds: what an approximation names in `statistics(layer)`."""

from fisherviz.statistics.moments import (
    SETTINGS,
    Block,
    CrossInputFactor,
    CrossOutputFactor,
    Diagonal,
    EigenMoment,
    GradientSum,
    InputFactor,
    OutputFactor,
    Setting,
    Statistic,
    UnitBlocks,
    update_all,
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
    "Setting",
    "Statistic",
    "UnitBlocks",
    "update_all",
]
