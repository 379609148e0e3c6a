"""Every approximation against the exact Fisher: measures, `compare`, the monitor of a training."""
