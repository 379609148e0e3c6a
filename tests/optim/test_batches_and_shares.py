"""The quadratic model is of all batches that a step accumulates, or of a share of their examples drawn at random."""

import pytest
import torch

import fisherviz as fv
from fisherviz.network.batches import Arguments
from fisherviz.optim.quadratic import FisherForms, choose
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches


@pytest.mark.parametrize("sizes", [(4, 1), (1, 3, 2)])
def test_forms_and_products_are_means_over_the_examples_of_all_batches(sizes):
    net, x = nets.mlp(3, 4, 2), nets.vectors(sum(sizes), 3)
    F = torch.as_tensor(exact.fisher(net, x, laws.Gaussian()))
    optimizer = fv.optim.HessianFree.paper(net, "gaussian")
    forms = FisherForms(optimizer._watcher, optimizer.likelihood, [((part,), {}) for part in x.split(sizes)])
    u, v = torch.randn(2, len(F)).double()
    along_u, along_v = (
        {p: d.view_as(p) for p, d in zip(net.parameters(), w.split([p.numel() for p in net.parameters()]), strict=True)}
        for w in (u, v)
    )
    assert forms.form(forms.tangents(along_u), forms.tangents(along_v)) == pytest.approx(float(u @ F @ v), rel=1e-9)
    product = forms.product(along_v)
    assert_matches(torch.cat([product[p].reshape(-1) for p in net.parameters()]), F @ v)


@pytest.mark.parametrize("left_out", [False, True])
def test_a_share_of_a_batch_is_any_of_its_examples_that_count_each_as_often(left_out):
    """200 draws of 3 among 6 leave each out half of the times; ±50 are seven standard deviations."""
    n, generator = 6, torch.Generator().manual_seed(0)
    weight = torch.ones(n + 1) if left_out else None
    if weight is not None:
        weight[2] = 0.0
    rows = torch.arange(n + (1 if left_out else 0))
    counting = [i for i in rows.tolist() if weight is None or weight[i]]
    times = torch.zeros(len(rows), dtype=torch.long)
    for _ in range(200):
        drawn = choose(Arguments((rows.unsqueeze(1),), {}, weight), 0.5, generator).args[0][:, 0]
        assert len(set(drawn.tolist())) == len(drawn) == 3
        times[drawn] += 1
    assert all(50 <= int(times[i]) <= 150 for i in counting)
    assert int(times.sum()) == int(times[counting].sum()) == 600
