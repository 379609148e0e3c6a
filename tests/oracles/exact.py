"""The Fisher information matrix by its definition: one `autograd.grad` per example and label.

F = 1/N sum_n E_y[score score^T], flattened in torch order over the trainable parameters. `by_jacobian` gets
the same matrix from J^T F_R J and so checks the labels of `laws`.
"""

import numpy as np
import torch


def trainable(model, names=None):
    """The parameters that count, as [(name, parameter)] in torch order; tied ones once."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad and (names is None or name in names)]


def flatten(gradients, parameters):
    """One (P,) vector; a parameter that the output does not depend on gives zeros."""
    pieces = [
        torch.zeros_like(p) if d is None else d.to_dense() for d, (_, p) in zip(gradients, parameters, strict=True)
    ]
    return torch.cat([piece.detach().reshape(-1) for piece in pieces]).double().numpy()


def outputs(model, x, n, output=None):
    """The flat output (D,) of example n alone."""
    with torch.enable_grad():
        z = model(x[n : n + 1])
        return (z if output is None else output(z)).reshape(-1)


def scores(model, x, law, *, targets=None, names=None, output=None):
    """Per example a list of (weight, score (P,)): over the law's labels, or the one target when given."""
    parameters = trainable(model, names)
    found = []
    for n in range(len(x)):
        z = outputs(model, x, n, output)
        labels = law.labels(z) if targets is None else [(1.0, targets[n])]
        found.append([])
        for weight, y in labels:
            gradients = torch.autograd.grad(
                law.log_density(z, y), [p for _, p in parameters], retain_graph=True, allow_unused=True
            )
            found[-1].append((weight, flatten(gradients, parameters)))
    return found


def fisher(model, x, law, *, targets=None, names=None, output=None, reduction="mean"):
    """The dense Fisher (P, P); with `targets` the empirical one."""
    total = 0.0
    for example in scores(model, x, law, targets=targets, names=names, output=output):
        for weight, score in example:
            total = total + weight * np.outer(score, score)
    return total / len(x) if reduction == "mean" else total


def jacobian(model, x, n, *, names=None, output=None):
    """d z_n / d theta, (D, P)."""
    parameters = trainable(model, names)
    z = outputs(model, x, n, output)
    rows = [torch.autograd.grad(z_d, [p for _, p in parameters], retain_graph=True, allow_unused=True) for z_d in z]
    return np.stack([flatten(row, parameters) for row in rows])


def by_jacobian(model, x, law, *, names=None, output=None):
    """The dense exact Fisher from Jacobians and the closed-form output Fisher."""
    total = 0.0
    for n in range(len(x)):
        J = jacobian(model, x, n, names=names, output=output)
        total = total + J.T @ law.output_fisher(outputs(model, x, n, output)).detach().double().numpy() @ J
    return total / len(x)


def mean_gradient(model, x, targets, law, *, names=None, output=None):
    """Gradient of the mean negative log-likelihood, (P,)."""
    found = scores(model, x, law, targets=targets, names=names, output=output)
    return -np.mean([example[0][1] for example in found], axis=0)


def fisher_of_batches(model, batches):
    """The mean categorical Fisher (P, P) over examples of batches, which are dictionaries of arguments of the model."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        for n in range(len(next(iter(batch.values())))):
            z = model(**{name: x[n : n + 1] for name, x in batch.items()})[0]
            p = z.softmax(0).detach()
            own, how = list(model.parameters()), {"retain_graph": True, "materialize_grads": True}
            rows = [torch.autograd.grad(v, own, allow_unused=True, **how) for v in z]
            J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
            total, count = total + J.T @ (p.diag() - torch.outer(p, p)) @ J, count + 1
    return total / count
