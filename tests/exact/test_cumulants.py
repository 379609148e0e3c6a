"""The cumulant error bound against a loop over all pairs of weights and all partitions."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import cumulants, laws, nets, trace


def setting(law):
    return nets.mlp(2, 2, 2), nets.vectors(5, 2), law.draw(5, 2)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("likelihood", laws.ALL)
def test_error_and_bound_are_the_sums_over_all_pairs_of_weights(likelihood, kind):
    law = laws.ALL[likelihood]
    net, x, y = setting(law)
    error, bound = cumulants.table(trace.moments(net, x, law, y if kind == "empirical" else None))
    result = fv.cumulants(fv.Probe(net, likelihood).fisher(x, y, kind=kind))
    assert result.error == pytest.approx(sum(np.abs(e).sum() for e in error.values()), rel=1e-8)
    assert result.bound == pytest.approx(sum(b.sum() for b in bound.values()), rel=1e-8)
    assert isinstance(result.error, float)
    assert isinstance(result.bound, float)


def test_table_has_one_row_per_pair_of_layers():
    law = laws.Categorical()
    net, x, _ = setting(law)
    error, bound = cumulants.table(trace.moments(net, x, law))
    frame = fv.cumulants(fv.Probe(net, "categorical").fisher(x)).frame
    names = ["0", "2"]
    assert len(frame) == 4
    for (i, j), e in error.items():
        row = frame[(frame["row"] == names[i]) & (frame["col"] == names[j])]
        assert row["error"].item() == pytest.approx(np.abs(e).sum(), rel=1e-8)
        assert row["bound"].item() == pytest.approx(bound[i, j].sum(), rel=1e-8)


def test_a_choice_of_layers_is_taken_jointly():
    law = laws.Categorical()
    net, x = nets.mlp(1, 2, 1, 2), nets.vectors(5, 1)
    error, bound = cumulants.table(trace.moments(net, x, law))
    result = fv.cumulants(fv.Probe(net, "categorical").fisher(x), layers=["2", "4"])
    chosen = [(i, j) for i in (1, 2) for j in (1, 2)]
    assert result.error == pytest.approx(sum(np.abs(error[ij]).sum() for ij in chosen), rel=1e-8)
    assert result.bound == pytest.approx(sum(bound[ij].sum() for ij in chosen), rel=1e-8)


def test_error_is_the_entrywise_distance_to_the_khatri_rao_matrix():
    net, x = nets.mlp(3, 4, 2), nets.vectors(6, 3)
    fisher = fv.Probe(net, "categorical").fisher(x)
    difference = fisher.to_dense() - fv.approximate(fisher, "kfac-full").to_dense()
    result = fv.cumulants(fisher)
    assert result.error == pytest.approx(float(difference.abs().sum()), rel=1e-9)
    assert result.bound >= result.error


def test_batches_do_not_change_the_sums():
    net, x = nets.mlp(3, 4, 2), nets.vectors(7, 3)
    probe = fv.Probe(net, "categorical")
    whole, batched = fv.cumulants(probe.fisher(x)), fv.cumulants(probe.fisher([x[:4], x[4:]]))
    assert batched.error == pytest.approx(whole.error, rel=1e-10)
    assert batched.bound == pytest.approx(whole.bound, rel=1e-10)


def test_deep_linear_network_has_no_error():
    net, x = nets.mlp(3, 4, 2, activation=nn.Identity), nets.vectors(6, 3)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    result = fv.cumulants(fisher)
    assert result.error < 1e-10 * float(fisher.to_dense().abs().sum())


def test_sampled_kind_is_the_empirical_one_for_its_labels():
    law = laws.Bernoulli()
    net, x, _ = setting(law)

    class Recording(fv.Bernoulli):
        def sample(self, z, generator=None):
            self.drawn = super().sample(z, generator)
            return self.drawn

    likelihood = Recording()
    result = fv.cumulants(fv.Probe(net, likelihood).fisher(x, kind="mc"))
    error, bound = cumulants.table(trace.moments(net, x, law, likelihood.drawn))
    assert result.error == pytest.approx(sum(np.abs(e).sum() for e in error.values()), rel=1e-8)
    assert result.bound == pytest.approx(sum(b.sum() for b in bound.values()), rel=1e-8)


def test_float32_models_give_the_same_sums_to_rounding():
    net, x = nets.mlp(3, 4, 2), nets.vectors(6, 3)
    double = fv.cumulants(fv.Probe(net, "categorical").fisher(x))
    single = fv.cumulants(fv.Probe(net.float(), "categorical").fisher(x.float()))
    assert single.error == pytest.approx(double.error, rel=1e-4)
    assert single.bound == pytest.approx(double.bound, rel=1e-4)


REFUSED = {
    "embedding": lambda: (nn.Sequential(nn.Embedding(3, 3), nn.Flatten()), torch.randint(3, (4, 1)), "0"),
    "weight sharing": lambda: (nets.tokens_net(), torch.randn(4, 2, 3, dtype=torch.float64), "0"),
}


@pytest.mark.parametrize("build", REFUSED.values(), ids=REFUSED.keys())
def test_layers_without_one_input_vector_per_example_are_refused_by_name(build):
    net, x, name = build()
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=name):
        fv.cumulants(fv.Probe(nets.randomised(net), "gaussian").fisher(x))


def test_layers_that_scale_single_features_are_left_out_unless_named():
    net, x = nets.randomised(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))), nets.vectors(4, 3)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert fv.cumulants(fisher).error == pytest.approx(fv.cumulants(fisher, ["0", "2"]).error)
    with pytest.raises(NotImplementedError, match="'1' has none: it scales single features"):
        fv.cumulants(fisher, "1")


def test_summed_fishers_are_scaled_or_refused():
    """The formula is one of expectations: E[a g g] scaled by N is not N times the bound of a mean."""
    net, x = nets.mlp(3, 4, 2), nets.vectors(6, 3)
    probe = fv.Probe(net, "categorical")
    mean = fv.cumulants(probe.fisher(x))
    try:
        total = fv.cumulants(probe.fisher(x, reduction="sum"))
    except (ValueError, NotImplementedError) as error:
        assert "mean" in str(error)  # noqa: PT017
    else:
        assert total.error == pytest.approx(6 * mean.error, rel=1e-9)
        assert total.bound == pytest.approx(6 * mean.bound, rel=1e-9)


def test_a_pair_without_a_bound_has_no_ratio():
    frame = pd.DataFrame([("a", "a", 0.5, 2.0), ("a", "b", 0.0, 0.0)], columns=["row", "col", "error", "bound"])
    shown = fv.CumulantBound(0.5, 2.0, frame, "exact")._repr_html_()
    assert ">0.250<" in shown
    assert ">–<" in shown


def test_a_layer_without_one_input_vector_per_example_is_refused_with_its_reason():
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.LayerNorm(9), nn.Linear(9, 2))
    fisher = fv.Probe(net, "categorical").fisher(torch.randn(5, 2, 4))
    for layer, why in (("0", "it shares weights over positions or has groups"), ("2", "it scales single features")):
        with pytest.raises(NotImplementedError, match=f"layer '{layer}' has none: {why}"):
            fv.cumulants(fisher, layer, progress=False)
