"""Training loops as users write them, each saying which examples of it count: what the rule of passes is tried on.

A loop gets a `Trial` and calls `counts` where by the manual's rule a pass counts, before it calls `step`. The trial
knows what the step has to be: by dense matrices (`dense`), or where a method has none, by an optimizer that sees the
passes that count and nothing else.
"""

from benchmarks.trust.loops import changing, dropped, plain, refused, several
from benchmarks.trust.loops.machinery import WORKERS
from benchmarks.trust.loops.trial import ENTERED, Make, Trial, ce

KINDS = (
    "one pass a step",
    "gradients that are changed",
    "several passes a step",
    "several backwards of one forward",
    "gradients dropped",
    "passes without a gradient",
    "gradients by autograd.grad",
    "a changing optimizer or model",
    "torch's machinery",
    "must be said",
    "derivatives in the loss",
)
"""In the order in which the page tells them."""
LOOPS = {kind: ENTERED[kind] for kind in KINDS}
"""By kind, then by name."""

__all__ = ["LOOPS", "WORKERS", "Make", "Trial", "ce", "changing", "dropped", "plain", "refused", "several"]
