"""The gradient of the data's loss, from the scores of its labels: by a pass of its own, or along with the captures."""

from __future__ import annotations

from torch import Tensor

from fisherviz.capture.captures import AnyCapture
from fisherviz.exact.passes import Consumer, Passes
from fisherviz.matrices.finite import require_finite_vector
from fisherviz.network.vectors import EmpiricalVectors, WithScores
from fisherviz.statistics import GradientSum, add_up, update_all
from fisherviz.statistics.examples import Examples


class Scores(Passes):
    """The data's side of a Fisher with the data's labels."""

    def has_targets(self) -> bool:
        """Whether every batch of the data carries targets; looks at one batch after the other until one has none."""
        return all(targets is not None for _, targets in self.data)

    def gradient(self) -> Tensor:
        """Gradient of the data's mean (or summed) negative log-likelihood, flat in torch order, (P,).

        Raises:
            ValueError: the data has no targets.
        """
        self.check_unchanged()
        if self._kept.gradient is None:
            summed = self._sum_scores() if self._kept.joint is None else [c.sum() for c in self._scores()]
            self._kept.gradient = self.space.join(summed)
        return require_finite_vector(self._kept.gradient * self.scale, self.space, "the gradient")

    def _scores(self) -> list[AnyCapture]:
        """The last vectors of the joint captures."""
        assert self._kept.joint is not None
        return [c.select_vectors(c.vectors - 1, c.vectors) for c in self._kept.joint.values()]

    def _sum_scores(self) -> list[Tensor]:
        """Sums of the scores' gradients by a pass of their own, by layer."""
        sums: list[GradientSum] = []

        def begin() -> Consumer:
            nonlocal sums
            sums = [GradientSum(name) for name in self.space.names]
            return lambda batch: update_all(sums, batch)

        self._over(EmpiricalVectors(self.network.likelihood), begin, keep=False, labels=True)
        add_up(sums, self.processes)
        return [s.total for s in sums if s.total is not None]

    def with_scores(self) -> Examples | None:
        """Kind's vectors and, as the last one, the scores of the data's labels, by one pass.

        None if they do not fit, or if batches differ in their numbers of vectors. Captures stay for later requests.
        """
        kept = self._kept
        if kept.joint is not None:
            self.check_unchanged()
        else:  # the pass does
            vectors = WithScores(self.vectors, EmpiricalVectors(self.network.likelihood))
            found = self._over(vectors, lambda: lambda batch: None, keep=True, labels=True)
            if found is None or found.uneven:  # then the scores are not everywhere the last of as many vectors
                return None
            kept = self._kept
            kept.joint = found.whole(self.network.device)
            kept.held = found.of_vectors(0, found.vectors - 1)
        assert kept.joint is not None
        return Examples(list(kept.joint.values()), self.scale)
