"""What fisherviz costs, against the public peers that run, as ratios measured in one run.

`python -m benchmarks.fisher` measures the analysis, `python -m benchmarks.optim` the optimizers' steps. Nothing of the
package imports this folder.
"""
