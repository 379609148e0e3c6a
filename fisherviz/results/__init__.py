"""What is saved and drawn: comparisons, runs, the names and words of metrics."""
