"""The three Fishers as vectors to backpropagate: exact, mc and empirical; the only place that tells them apart.

Vectors are scaled so that the sum of their outer products is the (estimated) output Fisher of one example.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherviz.network.likelihoods import Likelihood

KINDS = ("exact", "mc", "empirical")


class ExactVectors:
    """Columns of the output Fisher's factor S: the expectation over the model's labels, analytic."""

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood

    def count(self, z: Tensor) -> int:
        """Rank of the output Fisher."""
        return self.likelihood.num_vectors(z)

    def __call__(self, z: Tensor, targets: Tensor | None, first: int) -> Tensor:
        """Columns of S, (K, N, ...)."""
        self.likelihood.check_axis(z, targets)
        return self.likelihood.vectors(z)

    def product(self, z: Tensor, t: Tensor, targets: Tensor | None, first: int) -> Tensor:
        """F_R(z) t in closed form."""
        self.likelihood.check_axis(z, targets)
        return self.likelihood.product(z, t)


class SampledVectors:
    """Scores of labels drawn from the model, over √samples; the labels of the first pass serve all later ones."""

    def __init__(self, likelihood: Likelihood, samples: int, generator: torch.Generator) -> None:
        self.likelihood = likelihood
        self.samples = samples
        self.generator = generator
        self._labels: list[Tensor] = []
        self._drawn = 0

    def count(self, z: Tensor) -> int:
        """Number of samples."""
        return self.samples

    def labels(self, z: Tensor, first: int) -> Tensor:
        """Sampled labels (samples, N, ...) of examples first, first + 1, ..."""
        n = len(z)
        if first >= self._drawn:
            drawn = torch.stack([self.likelihood.sample(z, self.generator) for _ in range(self.samples)])
            self._labels.append(drawn)
            self._drawn = first + n
            return drawn
        if len(self._labels) > 1:
            self._labels = [torch.cat(self._labels, 1)]
        return self._labels[0][:, first : first + n]

    def __call__(self, z: Tensor, targets: Tensor | None, first: int) -> Tensor:
        """Scores (samples, N, ...) over √samples."""
        self.likelihood.check_axis(z, targets)
        scores = [self.likelihood.score(z, y) for y in self.labels(z, first)]
        return torch.stack(scores) / self.samples**0.5

    def product(self, z: Tensor, t: Tensor, targets: Tensor | None, first: int) -> Tensor:
        """Σ_k s_k (s_kᵀ t)."""
        return _outer_product(self(z, targets, first), t)


class EmpiricalVectors:
    """Scores of the data's labels."""

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood

    def count(self, z: Tensor) -> int:
        """One."""
        return 1

    def __call__(self, z: Tensor, targets: Tensor | None, first: int) -> Tensor:
        """Scores (1, N, ...)."""
        if targets is None:
            raise ValueError(
                "kind='empirical' needs the data's labels, and a batch has none; pass targets=, "
                "tuples (inputs, targets), or kind='exact' or 'mc'."
            )
        return self.likelihood.score(z, self.likelihood.check_targets(z, targets.to(z.device))).unsqueeze(0)

    def product(self, z: Tensor, t: Tensor, targets: Tensor | None, first: int) -> Tensor:
        """Score times its product with t."""
        return _outer_product(self(z, targets, first), t)


class NoVectors:
    """Nothing to backpropagate: a pass for inputs alone."""

    def count(self, z: Tensor) -> int:
        """Zero."""
        return 0

    def __call__(self, z: Tensor, targets: Tensor | None, first: int) -> Tensor:
        """An empty stack (0, N, ...)."""
        return z.new_empty(0, *z.shape)


AnyVectors = ExactVectors | SampledVectors | EmpiricalVectors


class WithScores:
    """A kind's vectors, and the scores of the data's labels as the last one."""

    def __init__(self, vectors: AnyVectors, scores: EmpiricalVectors) -> None:
        self.vectors = vectors
        self.scores = scores

    def count(self, z: Tensor) -> int:
        """One more than the kind's."""
        return self.vectors.count(z) + 1

    def __call__(self, z: Tensor, targets: Tensor | None, first: int) -> Tensor:
        """Vectors (K + 1, N, ...)."""
        return torch.cat([self.vectors(z, targets, first), self.scores(z, targets, first)])


def _outer_product(vectors: Tensor, t: Tensor) -> Tensor:
    flat = vectors.flatten(2)
    weights = (flat * t.flatten(1)).sum(2, keepdim=True)
    return (weights * flat).sum(0).reshape(t.shape)


def make_vectors(
    likelihood: Likelihood, kind: str, samples: int, generator: torch.Generator | None, device: torch.device
) -> AnyVectors:
    """The vectors of a kind of Fisher.

    Args:
        likelihood: the predictive distribution.
        kind: "exact", "mc" or "empirical".
        samples: labels per example for kind "mc".
        generator: source of the labels' seed; None: `torch.initial_seed()`.
        device: where outputs will be.

    Returns:
        A vector source.

    Raises:
        ValueError: the kind is unknown, or samples is not a positive whole number.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a positive whole number, got {samples!r}.")
    if kind == "exact":
        return ExactVectors(likelihood)
    if kind == "empirical":
        return EmpiricalVectors(likelihood)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}.")
    # the user's generator gives one seed, so that two Fishers made with it see different labels
    seed = (
        torch.initial_seed()
        if generator is None
        else int(torch.randint(2**62, (), generator=generator, device=generator.device))
    )
    private = torch.Generator(device=device).manual_seed(seed)
    return SampledVectors(likelihood, samples, private)
