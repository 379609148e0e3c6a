"""Fair training comparisons: problems, tuning with equal effort, runs that are kept one by one and resume."""
