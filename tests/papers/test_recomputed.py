"""Figures of the exhibits recomputed by plain torch, from the weights alone: sums over moments written out."""

import pytest
import torch
from torch import nn

from fisherviz.papers.benzing import similarity
from fisherviz.papers.kfac.matrices import sums
from fisherviz.papers.kfac.network import MIDDLE, kfac_networks
from fisherviz.papers.trials.problems import Problem
from fisherviz.papers.trials.work import Run

RUN = Run("smoke", progress=False)


def moments(net):
    """Inputs with the 1 of the bias (N, da) and output gradients for each label (N, C, do) of the middle layers; p."""
    (x, _), *_ = net.batches
    inputs, outputs, z = {}, {}, x
    for name, module in net.model.named_children():
        if name in MIDDLE:
            inputs[name] = torch.cat([z.detach(), torch.ones(len(z), 1, dtype=z.dtype)], 1)
        z = module(z)
        if name in MIDDLE:
            outputs[name] = z
    p = z.detach().softmax(1)
    gradients = {name: [] for name in MIDDLE}
    for label in range(z.shape[1]):
        loss = nn.functional.cross_entropy(z, torch.full((len(z),), label), reduction="sum")
        found = torch.autograd.grad(loss, list(outputs.values()), retain_graph=True)
        for name, g in zip(MIDDLE, found, strict=True):
            gradients[name].append(g)
    return inputs, {name: torch.stack(g, 1) for name, g in gradients.items()}, p


def test_error_and_bound_of_the_cumulant_exhibit_are_sums_over_plain_moments():
    net = kfac_networks(RUN).first
    inputs, gradients, p = moments(net)
    n = len(p)
    error = bound = 0.0
    for first in MIDDLE:
        for second in MIDDLE:
            a, b, g, h = inputs[first], inputs[second], gradients[first], gradients[second]
            weighted = p[:, :, None] * g / n
            whole = torch.einsum("ni,nj,nck,ncl->ijkl", a, b, weighted, h)
            gg = torch.einsum("nck,ncl->kl", weighted, h)
            ab = a.T @ b / n
            error += float((whole - ab[:, :, None, None] * gg).abs().sum())
            # cumulants of a, b, g, h; gradients have mean 0 under the model's labels whatever the input (lemma 4)
            c, d = a - a.mean(0), b - b.mean(0)
            four = torch.einsum("ni,nj,nck,ncl->ijkl", c, d, weighted, h) - (c.T @ d / n)[:, :, None, None] * gg
            left = torch.einsum("nj,nck,ncl->jkl", d, weighted, h)  # κ(b, g, h)
            right = torch.einsum("ni,nck,ncl->ikl", c, weighted, h)  # κ(a, g, h)
            bound += float(four.abs().sum())
            bound += float((a.mean(0).abs()[:, None, None, None] * left.abs()[None]).sum())
            bound += float((b.mean(0).abs()[None, :, None, None] * right.abs()[:, None]).sum())
    values = sums(RUN).claims[0].values
    assert values["error"] == pytest.approx(error, rel=1e-8)
    assert values["bound"] == pytest.approx(bound, rel=1e-8)


def test_cosines_of_figure_4a_are_those_of_dense_plain_matrices():
    problem = Problem("digits", "foof-mlp", (("hidden", (6, 5)),), batch=20, limit=100, standardise=True)
    item = (problem, "K-FAC", 3, 1, 40)
    found = similarity._cosines(item, RUN)[similarity.BALANCE]
    data = problem.data()
    model = similarity._in_training(problem, data, "K-FAC", 3, 1).double()
    x, y = data.train.inputs[:40].double(), data.train.targets[:40]
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs, outputs = [], []
    for layer in layers:
        layer.register_forward_hook(lambda _, args, z: (inputs.append(args[0].detach()), outputs.append(z))[0])
    z = model(x)
    # one label for each example by inversion of its distribution function
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(1)))
    u = torch.rand(40, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = (z.detach().float().softmax(1).cumsum(1, dtype=torch.float64) < u).sum(1).clamp(max=9)
    sampled = torch.autograd.grad(nn.functional.cross_entropy(z, labels, reduction="sum"), outputs, retain_graph=True)
    gradients = torch.autograd.grad(nn.functional.cross_entropy(z, y), [layer.weight for layer in layers])
    for damping, row in zip(similarity.DAMPINGS, found, strict=True):
        kfac = {"foof_cosine_factored": [], "foof_cosine_eigenvalues": []}
        foof = []
        for a, g, v in zip(inputs, sampled, gradients, strict=True):
            A, G = a.T @ a / 40, g.T @ g / 40
            share = (A.trace() / G.trace()).sqrt()  # λ_A / λ_E = tr A / tr G and λ_A λ_E = λ
            damped_A = A + damping**0.5 * share * torch.eye(len(A))
            damped_G = G + damping**0.5 / share * torch.eye(len(G))
            foof.append(torch.linalg.solve(damped_A, v.T).T.flatten())
            kfac["foof_cosine_factored"].append(torch.linalg.solve(damped_G, foof[-1].view_as(v)).flatten())
            whole = torch.kron(G, A) + damping * torch.eye(len(A) * len(G))
            kfac["foof_cosine_eigenvalues"].append(torch.linalg.solve(whole, v.flatten()))
        for name, parts in kfac.items():
            cosine = torch.cosine_similarity(torch.cat(parts), torch.cat(foof), dim=0)
            assert row[name] == pytest.approx(float(cosine), rel=1e-6)
