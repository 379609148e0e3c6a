"""Likelihoods by what users have: a name, an instance, or an `nn` loss with its own scale."""

from __future__ import annotations

import math

from torch import Tensor, nn

from fisherviz.network.categorical import Categorical
from fisherviz.network.distributions import Bernoulli, Gaussian, Likelihood
from fisherviz.support.choices import one_of

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood", "resolve"]


class _MeanSquaredError(Gaussian):
    """`nn.MSELoss(reduction="mean")`: averaging over D outputs is a Gaussian of variance D / 2."""

    def __init__(self) -> None:
        super().__init__()

    def variance(self, z: Tensor) -> float:
        """Half the number of outputs of one example."""
        return math.prod(z.shape[1:]) / 2

    def describe(self) -> str:
        """Name of the distribution with its variance."""
        return "Gaussian(variance=D/2)  # MSELoss averages over the D outputs"


class _MeanBinaryCrossEntropy(Bernoulli):
    """`nn.BCEWithLogitsLoss(reduction="mean")`: a negative log-likelihood for one output only."""

    def check_output(self, z: Tensor) -> None:
        """Refuse more than one output: the mean over outputs is no negative log-likelihood."""
        super().check_output(z)
        if math.prod(z.shape[1:]) > 1:
            raise ValueError(
                f"BCEWithLogitsLoss(reduction='mean') averages over the {math.prod(z.shape[1:])} outputs, and the mean "
                "of log-likelihoods is the log-likelihood of no distribution; pass fv.Bernoulli() (the sum) instead."
            )


class _MeanCrossEntropy(Categorical):
    """`nn.CrossEntropyLoss(reduction="mean")`: a negative log-likelihood where there are no further positions."""

    def __init__(self, ignore_index: int) -> None:
        super().__init__(1, ignore_index)

    def describe(self) -> str:
        """Name of the distribution; where the classes are matters only with positions, which are refused."""
        return self._other.describe()

    def check_output(self, z: Tensor) -> None:
        """Refuse positions after the class dimension: their mean is no negative log-likelihood."""
        super().check_output(z)
        if math.prod(z.shape[2:]) > 1:
            raise ValueError(
                f"CrossEntropyLoss(reduction='mean') averages over the {math.prod(z.shape[2:])} positions of an "
                "example, and the mean of log-likelihoods is the log-likelihood of no distribution; pass the sum: "
                f"fv.{self.describe()} for classes on the last axis, "
                f"fv.{Categorical(1, self.ignore_index).describe()} for the second."
            )


_BY_NAME: dict[str, type[Likelihood]] = {"categorical": Categorical, "bernoulli": Bernoulli, "gaussian": Gaussian}


def resolve(likelihood: str | Likelihood | nn.Module) -> Likelihood:
    """Return the likelihood that a name, an instance or an `nn` loss stands for, with the loss's own scale.

    A loss with `reduction="none"` counts as one with "sum": its entries are the terms of one example's log-likelihood.

    Args:
        likelihood: "categorical", "bernoulli", "gaussian", a `Likelihood`, or an unweighted `nn.CrossEntropyLoss`,
            `nn.BCEWithLogitsLoss` or `nn.MSELoss`.

    Returns:
        The likelihood.

    Raises:
        ValueError: the name is unknown or the loss is weighted or smoothed.
        TypeError: the loss is not on the list.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str):
        return _BY_NAME[one_of("likelihood", likelihood, _BY_NAME)]()
    if type(likelihood) is nn.CrossEntropyLoss:
        _refuse(likelihood.weight is not None, "class weights", "fv.Categorical()")
        _refuse(likelihood.label_smoothing != 0, "label smoothing", "fv.Categorical()")
        left_out = likelihood.ignore_index
        return _MeanCrossEntropy(left_out) if likelihood.reduction == "mean" else Categorical(1, left_out)
    if type(likelihood) is nn.BCEWithLogitsLoss:
        _refuse(likelihood.weight is not None, "weights", "fv.Bernoulli()")
        _refuse(likelihood.pos_weight is not None, "pos_weight", "fv.Bernoulli()")
        return _MeanBinaryCrossEntropy() if likelihood.reduction == "mean" else Bernoulli()
    if type(likelihood) is nn.MSELoss:
        return _MeanSquaredError() if likelihood.reduction == "mean" else Gaussian(variance=0.5)
    if isinstance(likelihood, type) and issubclass(likelihood, Likelihood):
        return likelihood()
    raise TypeError(
        f"cannot tell the predictive distribution of {type(likelihood).__name__}; pass 'categorical', 'bernoulli', "
        "'gaussian', fv.Gaussian(variance=...), nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss() or nn.MSELoss()."
    )


def _refuse(condition: bool, what: str, instead: str) -> None:
    if condition:
        raise ValueError(
            f"a loss with {what} is not the negative log-likelihood of a predictive distribution; "
            f"its Fisher is not defined: pass {instead}."
        )
