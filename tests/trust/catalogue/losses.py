"""Likelihoods by what users have, and kinds that are mistaken."""

import torch
from torch import nn

import fisherviz as fv
from tests.oracles import laws
from tests.trust.catalogue.parts import network
from tests.trust.catalogue.row import Row, drawn, normal


def rows():
    """The rows of this kind."""
    build = drawn(network)
    x = lambda: normal(5, 3)  # noqa: E731
    classes, values = torch.tensor([0, 1, 1, 0, 1]), normal(5, 2, seed=8)
    refused = {
        "class weights": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0])), "class weights"),
        "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), "label smoothing"),
        "pos_weight": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0])), "pos_weight"),
        "weights of outputs": (nn.BCEWithLogitsLoss(weight=torch.tensor([1.0, 2.0])), "weights"),
        "mean over several logits": (nn.BCEWithLogitsLoss(), "the log-likelihood of no distribution"),
        "Huber": (nn.HuberLoss(), "cannot tell the predictive distribution of HuberLoss"),
        "negative log-likelihood of log-softmax": (nn.NLLLoss(), "cannot tell the predictive distribution"),
    }
    found = [Row(f"{name}, loss", build, x, said, likelihood=loss) for name, (loss, said) in refused.items()]
    right = {
        "cross-entropy, mean": (nn.CrossEntropyLoss(), laws.Categorical()),
        "cross-entropy, sum": (nn.CrossEntropyLoss(reduction="sum"), laws.Categorical()),
        "cross-entropy, none": (nn.CrossEntropyLoss(reduction="none"), laws.Categorical()),
        "binary cross-entropy, sum": (nn.BCEWithLogitsLoss(reduction="sum"), laws.Bernoulli()),
        "squared error, sum: variance 1/2": (nn.MSELoss(reduction="sum"), laws.Gaussian(0.5)),
        "squared error, mean: variance D/2": (nn.MSELoss(), laws.Gaussian(1.0)),
        "Gaussian of another variance": (fv.Gaussian(variance=0.3), laws.Gaussian(0.3)),
    }
    found += [Row(name, build, x, likelihood=loss, law=law) for name, (loss, law) in right.items()]
    found += [
        Row("sum over examples", build, x, options={"reduction": "sum"}),
        Row("labels of the data", build, lambda: (x(), classes), options={"kind": "empirical"},
            targets=lambda: classes),
        Row("values of the data", build, lambda: (x(), values), law=laws.Gaussian(), options={"kind": "empirical"},
            targets=lambda: values),
        Row("labels that are left out", build, lambda: (normal(7, 3), torch.tensor([0, 1, -100, 0, -100, 1, 1])),
            examples=lambda data: [((data[0][n : n + 1],), {}) for n in (0, 1, 3, 5, 6)]),
        Row("real targets of classes", build, lambda: (x(), values), "no labels of a categorical likelihood"),
        Row("probabilities as targets", build, lambda: (x(), values.softmax(1))),
        Row("class indices of a Gaussian", build, lambda: (x(), classes), "class indices", law=laws.Gaussian()),
        Row("class indices of logits", build, lambda: (x(), classes), "class indices", law=laws.Bernoulli()),
        Row("values of logits", build, lambda: (x(), values), "lie in \\[0, 1\\]", law=laws.Bernoulli()),
        Row("two tensors for a model of two inputs", build, lambda: (x(), values), "no labels of a categorical"),
        Row("transposed targets", drawn(lambda: nn.Sequential(nn.Linear(3, 6), nn.Unflatten(1, (2, 3)))),
            lambda: (x(), normal(5, 3, 2)), "targets must have the outputs' shape", law=laws.Gaussian(),
            options={"kind": "empirical"}),
        Row("one logit", drawn(lambda: nn.Linear(3, 1)), x, "needs outputs \\(N, C\\) with C >= 2"),
    ]  # fmt: skip
    return found
