"""Labels of kind "mc" are drawn once for each example, whatever passes follow and however batches are cut in them."""

import pytest
import torch

import fisherviz as fv
from tests.oracles import nets
from tests.oracles.checks import assert_matches


class Restless(fv.Categorical):
    """A likelihood that heeds no generator: it draws other labels whenever it is asked."""

    def __init__(self):
        super().__init__()
        self.draws = 0

    def sample(self, z, generator=None):
        """Labels that count the draws: no two draws agree anywhere."""
        self.draws += 1
        return torch.full(z.shape[:1], self.draws % z.shape[1])


class Recording(fv.Categorical):
    """The likelihood, keeping every batch of labels that it draws."""

    drawn = ()

    def sample(self, z, generator=None):
        y = super().sample(z, generator)
        self.drawn = (*self.drawn, y)
        return y


@pytest.mark.parametrize("forward_mode", [True, False], ids=["by forward mode", "from captures"])
def test_a_likelihood_that_never_draws_the_same_twice_has_one_fisher(forward_mode):
    probe = fv.Probe(nets.mlp(3, 3, 4), Restless())
    x = nets.vectors(5, 3)
    fisher = probe.fisher([x[:2], x[2:]], kind="mc")
    v = nets.vectors(fisher.shape[0], 1)[:, 0]
    first = fisher @ v if forward_mode else fisher.diagonal()
    dense = fisher.to_dense()
    assert_matches(first, dense @ v if forward_mode else dense.diagonal())
    assert_matches(fisher.fresh() @ v, dense @ v)
    assert probe.likelihood.draws == 2, "once for each batch"


def test_batches_of_the_same_examples_draw_labels_of_their_own():
    """Uniform outputs over 4 classes: 40 labels that agree between two batches have a probability of 4⁻⁴⁰."""
    net, x = nets.mlp(3, 4), nets.vectors(40, 3)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    recorder = Recording()
    fisher = fv.Probe(net, recorder).fisher([x, x], kind="mc")
    fisher.diagonal()
    first, second = recorder.drawn
    assert (first != second).any()
