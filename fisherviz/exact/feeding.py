"""Statistics that are fed one batch, each with what it takes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, MutableMapping

import torch

from fisherviz.capture.batch import Batch
from fisherviz.statistics import Statistic
from fisherviz.support.timing import Effort, so_far


def feed(
    statistics: Mapping[Hashable, Statistic],
    batch: Batch,
    efforts: MutableMapping[Hashable, Effort],
    device: torch.device,
) -> None:
    """Add a batch to statistics.

    Args:
        statistics: by key.
        batch: of which per-example gradients are formed once for all of them, and count for each.
        efforts: by key; each grows by what its statistic takes, as if it were alone.
        device: that the work is done on.
    """
    forming = dict.fromkeys(batch.captures, Effort())
    names = {name for statistic in statistics.values() if statistic.forms for name in statistic.layers}
    for name in sorted(names.intersection(batch.forming)):
        start = so_far(device)
        batch.smaller(name)
        forming[name] = so_far(device) - start
    start = so_far(device)
    for key, statistic in statistics.items():
        statistic.update(batch)
        now = so_far(device)
        shared = [forming[name] for name in set(statistic.layers)] if statistic.forms else []
        efforts[key] = sum(shared, efforts[key] + (now - start))
        start = now
