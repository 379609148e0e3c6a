"""The three Fishers as vectors to backpropagate: exact, mc and empirical; the only place that tells them apart.

Vectors are scaled so that the sum of their outer products is the (estimated) output Fisher of one example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from fisherviz.network.likelihoods import Likelihood
from fisherviz.support import choices

KINDS = ("exact", "mc", "empirical")


class Vectors(ABC):
    """What the kinds share."""

    def start(self, first: int, examples: int) -> None:  # noqa: B027 - most have nothing to do
        """Announce a batch that may come in pieces, by the position of its first example."""

    @abstractmethod
    def __call__(self, z: Tensor, targets: Tensor | None, first: int) -> Tensor:
        """All vectors, (K, N, ...)."""

    def part(self, z: Tensor, targets: Tensor | None, first: int, start: int, stop: int) -> Tensor:
        """Vectors start..stop, (stop - start, N, ...)."""
        return self(z, targets, first)[start:stop]


def checked_counts(likelihood: Likelihood, z: Tensor, targets: Tensor | None) -> Tensor | None:
    """The positions (N, ...) of an output that count, where the data's targets leave some out; None: all.

    Raises:
        ValueError: the targets cannot be those of this output.
        TypeError: they can be those of none.
    """
    if targets is not None:
        likelihood.check_data(z, targets)
    return _counts(likelihood, targets)


def _counts(likelihood: Likelihood, targets: Tensor | None) -> Tensor | None:
    """The same of targets that have been checked."""
    return None if targets is None else likelihood.counted(targets)


class ExactVectors(Vectors):
    """Columns of the output Fisher's factor S: the expectation over the model's labels, analytic."""

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood

    def count(self, z: Tensor) -> int:
        """Rank of the output Fisher."""
        return self.likelihood.num_vectors(z)

    def __call__(self, z: Tensor, targets: Tensor | None, first: int) -> Tensor:
        """Columns of S, (K, N, ...)."""
        return self.part(z, targets, first, 0, self.count(z))

    def part(self, z: Tensor, targets: Tensor | None, first: int, start: int, stop: int) -> Tensor:
        """Columns start..stop of S; no others are made."""
        counted = _counts(self.likelihood, targets)
        return self.likelihood.only(self.likelihood.vectors(z, start, stop), counted)

    def product(self, z: Tensor, t: Tensor, targets: Tensor | None, first: int) -> Tensor:
        """F_R(z) t in closed form."""
        counted = checked_counts(self.likelihood, z, targets)
        return self.likelihood.only(self.likelihood.product(z, t), counted)


class SampledVectors(Vectors):
    """Scores of labels drawn from the model, over √samples; the labels of the first pass serve all later ones.

    Labels depend on the seed and on the batches alone: neither on the pieces that a batch is cut into, nor on which
    of them this process takes, nor on an exception in the middle of the pass that draws them.
    """

    def __init__(self, likelihood: Likelihood, samples: int, seed: int, device: torch.device) -> None:
        self.likelihood, self.samples, self.seed = likelihood, samples, seed
        self.generator = torch.Generator(device=device)
        self._drawn: dict[int, _Labels] = {}
        """By position of a batch's first example."""
        self._current = 0

    def count(self, z: Tensor) -> int:
        """Number of samples."""
        return self.samples

    def start(self, first: int, examples: int) -> None:
        """Announce a batch that may come in pieces."""
        self._current = first
        if first not in self._drawn:
            self._drawn[first] = _Labels(examples)

    def labels(self, z: Tensor, first: int) -> Tensor:
        """Sampled labels (samples, N, ...) of examples first, first + 1, ..."""
        batch = self._drawn.get(self._current)
        if batch is None or not self._current <= first < self._current + batch.examples:
            self.start(first, len(z))
            batch = self._drawn[first]
        low = first - self._current
        if not bool(batch.known[low : low + len(z)].all()):
            self._draw(batch, z, low)
        return batch.labels[:, low : low + len(z)]

    def _draw(self, batch: _Labels, z: Tensor, low: int) -> None:
        """Draw for the whole batch with only these examples' outputs in their places, and keep what is theirs."""
        whole = z
        if len(z) < batch.examples:
            whole = z[:1].repeat(batch.examples, *[1] * (z.dim() - 1))
            whole[low : low + len(z)] = z
        # each batch has its own stream, which those who skip the batches before it need not draw
        self.generator.manual_seed((self.seed + _STRIDE * self._current) % 2**63)
        drawn = torch.stack([self.likelihood.sample(whole, self.generator) for _ in range(self.samples)])
        if bool(batch.known.any()):
            drawn[:, batch.known] = batch.labels[:, batch.known]
        batch.labels = drawn
        batch.known[low : low + len(z)] = True

    def __call__(self, z: Tensor, targets: Tensor | None, first: int) -> Tensor:
        """Scores (samples, N, ...) over √samples."""
        counted = _counts(self.likelihood, targets)
        scores = [self.likelihood.score(z, y) for y in self.labels(z, first)]
        return self.likelihood.only(torch.stack(scores) / self.samples**0.5, counted)

    def product(self, z: Tensor, t: Tensor, targets: Tensor | None, first: int) -> Tensor:
        """Σ_k s_k (s_kᵀ t)."""
        checked_counts(self.likelihood, z, targets)
        return _outer_product(self(z, targets, first), t)


_STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of neighbouring positions in the data: odd, and far apart modulo any power of two."""


class _Labels:
    """Labels of one batch, those of `known` examples drawn."""

    def __init__(self, examples: int) -> None:
        self.examples, self.known = examples, torch.zeros(examples, dtype=torch.bool, device="cpu")
        self.labels = torch.empty(0, device="cpu")


class EmpiricalVectors(Vectors):
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


class NoVectors(Vectors):
    """Nothing to backpropagate: a pass for inputs alone."""

    def count(self, z: Tensor) -> int:
        """Zero."""
        return 0

    def __call__(self, z: Tensor, targets: Tensor | None, first: int) -> Tensor:
        """An empty stack (0, N, ...)."""
        return z.new_empty(0, *z.shape)


class FreshVectors:
    """The vectors of training passes: of the model's own labels, which are drawn anew for every pass.

    Args:
        likelihood: the predictive distribution.
        kind: "exact"; anything else samples labels from the model.
        samples: labels per example.
        generator: where the labels come from.
        step: gives the number of the step, for errors.
    """

    def __init__(
        self, likelihood: Likelihood, kind: str, samples: int, generator: torch.Generator, step: Callable[[], int]
    ) -> None:
        self.likelihood, self.kind, self.samples = likelihood, kind, samples
        self.generator, self.step = generator, step

    def __call__(self, z: Tensor) -> Tensor:
        """Vectors (K, N, ...) of an output (N, ...), in its type.

        Raises:
            ValueError: labels are to be sampled from NaN or infinite outputs.
        """
        shaped = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
        shaped = shaped.unsqueeze(1) if z.dim() == 1 else shaped
        self.likelihood.check_output(shaped)
        if self.kind == "exact":
            vectors = self.likelihood.vectors(shaped)
        else:
            if bad := not_finite(shaped):  # before sampling, which on an accelerator would end the process's context
                raise ValueError(NOT_FINITE.format(self.step(), bad, len(z)))
            drawn = [self.likelihood.sample(shaped, self.generator) for _ in range(self.samples)]
            vectors = torch.stack([self.likelihood.score(shaped, y) for y in drawn]) / self.samples**0.5
        return vectors.to(z.dtype).reshape(-1, *z.shape)


NOT_FINITE = (
    "at step {}, the model's output is NaN or infinite for {} of {} examples; look for such values in the inputs and "
    "the weights, and where training has diverged, lower lr or raise damping."
)


def not_finite(z: Tensor) -> int:
    """Number of examples whose output (N, ...) is NaN or infinite."""
    bad = ~z.isfinite()
    return int((bad.flatten(1).any(1) if z.dim() > 1 else bad).sum())


AnyVectors = ExactVectors | SampledVectors | EmpiricalVectors


class WithScores(Vectors):
    """A kind's vectors, and the scores of the data's labels as the last one."""

    def __init__(self, vectors: AnyVectors, scores: EmpiricalVectors) -> None:
        self.vectors = vectors
        self.scores = scores

    def start(self, first: int, examples: int) -> None:
        """Announce a batch to the kind."""
        self.vectors.start(first, examples)

    def count(self, z: Tensor) -> int:
        """One more than the kind's."""
        return self.vectors.count(z) + 1

    def __call__(self, z: Tensor, targets: Tensor | None, first: int) -> Tensor:
        """Vectors (K + 1, N, ...)."""
        return self.part(z, targets, first, 0, self.count(z))

    def part(self, z: Tensor, targets: Tensor | None, first: int, start: int, stop: int) -> Tensor:
        """Vectors start..stop of these."""
        k = self.vectors.count(z)
        found = [self.vectors.part(z, targets, first, start, min(stop, k))] if start < k else []
        return torch.cat([*found, self.scores(z, targets, first)] if stop > k else found)


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
    choices.one_of("kind", kind, KINDS)
    choices.count("samples", samples)
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
    return SampledVectors(likelihood, samples, seed, device)
