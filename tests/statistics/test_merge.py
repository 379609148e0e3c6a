"""Running sums over examples: batches, merging, decay and state, for every statistic that the package has."""

import pytest
import torch

import fisherviz as fv
from fisherviz import statistics
from fisherviz.capture.captures import Capture
from tests.oracles import kronecker, laws, nets, trace
from tests.oracles.checks import assert_matches

STATISTICS = {
    "input factor": lambda: statistics.InputFactor("0"),
    "output factor": lambda: statistics.OutputFactor("0"),
    "input factor between layers": lambda: statistics.CrossInputFactor("0", "2"),
    "output factor between layers": lambda: statistics.CrossOutputFactor("0", "2"),
    "unit blocks": lambda: statistics.UnitBlocks("0"),
    "diagonal": lambda: statistics.Diagonal("2"),
    "block": lambda: statistics.Block("0", "2"),
}
every_statistic = pytest.mark.parametrize("make", STATISTICS.values(), ids=STATISTICS.keys())


def setting():
    return nets.mlp(3, 4, 2), nets.vectors(7, 3)


def collected(net, data, make):
    (statistic,) = fv.Probe(net, "categorical").fisher(data).collect([make()])
    return statistic


@every_statistic
def test_merged_parts_are_the_whole(make):
    net, x = setting()
    whole, left, right = (collected(net, part, make) for part in (x, x[:3], x[3:]))
    left.merge(right)
    assert left.count == whole.count == 7
    assert_matches(left.mean, whole.mean, 1e-12)
    assert right.count == 4


@every_statistic
def test_decayed_average_is_that_of_the_means(make):
    net, x = setting()
    first, second = collected(net, x[:3], make), collected(net, x[3:], make)
    expected = 0.9 * first.mean + 0.1 * second.mean
    average = make()
    average.blend(first, 0.9)
    assert_matches(average.mean, first.mean, 1e-12)
    average.blend(second, 0.9)
    assert_matches(average.mean, expected, 1e-12)


@every_statistic
def test_state_survives_saving(make, tmp_path):
    net, x = setting()
    statistic = collected(net, x, make)
    torch.save(statistic.state_dict(), tmp_path / "state.pt")
    restored = make()
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_matches(restored.mean, statistic.mean, 0)
    assert restored.count == 7
    restored.merge(statistic)
    assert statistic.count == 7


def test_statistics_of_different_quantities_do_not_merge():
    net, x = setting()
    one, other = (collected(net, x, STATISTICS[name]) for name in ("input factor", "output factor"))
    with pytest.raises((ValueError, TypeError), match="merge"):
        one.merge(other)


def test_a_statistic_without_examples_has_no_mean():
    with pytest.raises(RuntimeError, match="no example"):
        _ = statistics.InputFactor("0").mean


def test_factors_are_the_moments_of_inputs_and_pseudo_gradients():
    net, x = setting()
    A, G = kronecker.factors(trace.moments(net, x, laws.Categorical()))
    for i, layer in enumerate(("0", "2")):
        assert_matches(collected(net, x, lambda n=layer: statistics.InputFactor(n)).mean, A[i, i])
        assert_matches(collected(net, x, lambda n=layer: statistics.OutputFactor(n)).mean, G[i, i])
    assert_matches(collected(net, x, STATISTICS["input factor between layers"]).mean, A[0, 1])
    assert_matches(collected(net, x, STATISTICS["output factor between layers"]).mean, G[0, 1])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("of", ["expand", "reduce", "sum"])
def test_a_second_moment_shows_its_rows(of, groups):
    """Loops over examples, vectors, positions and groups; the sum of the weighted rows' outer products is the same."""
    torch.manual_seed(0)
    K, N, T, da, dg = 2, 4, 3, 5, 2
    a, g = torch.randn(N, T, groups, da).double(), torch.randn(K, N, T, groups, dg).double()
    grouped = Capture(a, g) if groups > 1 else Capture(a[:, :, 0], g[:, :, :, 0])
    A, G = torch.zeros(groups, da, da).double(), torch.zeros(groups, dg, dg).double()
    for n in range(N):
        for h in range(groups):
            positions = [a[n, :, h].mean(0)] if of == "reduce" else a[n, :, h]
            A[h] += sum(torch.outer(x, x) for x in positions) / (T if of == "expand" else 1)
            for k in range(K):
                vectors = [g[k, n, :, h].sum(0)] if of == "reduce" else g[k, n, :, h]
                G[h] += sum(torch.outer(x, x) for x in vectors)
    for statistic, expected in ((statistics.InputFactor("0", of), A), (statistics.OutputFactor("0", of), G)):
        rows, weight = statistic.rows(grouped)
        for found in (weight * rows.mT @ rows, statistic.contribution(grouped)):
            assert_matches(found, expected if groups > 1 else expected[0], 1e-12)
    assert isinstance(statistic, statistics.RowsStatistic)
