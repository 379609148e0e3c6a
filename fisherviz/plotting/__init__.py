"""Pictures of matrices and comparisons, reached as `fisherviz.plot`: numbers gathered first, drawn second.

Every function accepts `ax=`, returns Axes or a Figure, never calls `show` and leaves global settings alone.
`heatmap_info`, `pareto_info`, ... return what the picture shows without drawing it.
"""

from fisherviz.plotting.bars import comparison, comparison_info
from fisherviz.plotting.fronts import pareto, pareto_info
from fisherviz.plotting.heatmaps import heatmap, heatmap_info, shared_maximum
from fisherviz.plotting.means import block_means, block_means_info
from fisherviz.plotting.spectra import spectrum, spectrum_info
from fisherviz.plotting.sweeps import sweep, sweep_info
from fisherviz.plotting.training import monitor, monitor_info, training, training_info
from fisherviz.plotting.triptychs import triptych, triptych_info

__all__ = [
    "block_means",
    "block_means_info",
    "comparison",
    "comparison_info",
    "heatmap",
    "heatmap_info",
    "monitor",
    "monitor_info",
    "pareto",
    "pareto_info",
    "shared_maximum",
    "spectrum",
    "spectrum_info",
    "sweep",
    "sweep_info",
    "training",
    "training_info",
    "triptych",
    "triptych_info",
]
