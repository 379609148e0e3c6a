"""The cumulant bound with several sampled labels for each example."""

import pytest
import torch

import fisherviz as fv
from tests.oracles import nets


class Recording(fv.Categorical):
    """The likelihood, keeping every batch of labels that it draws."""

    drawn = ()

    def sample(self, z, generator=None):
        y = super().sample(z, generator)
        self.drawn = (*self.drawn, y)
        return y


@pytest.mark.parametrize("samples", [1, 3])
def test_several_labels_of_an_example_are_as_many_examples_with_one_label_each(samples):
    net, x = nets.mlp(3, 4, 3), nets.vectors(9, 3)
    recorder = Recording()
    found = fv.cumulants(fv.Probe(net, recorder).fisher(x, kind="mc", samples=samples))
    repeated, labels = x.repeat(samples, 1), torch.cat(recorder.drawn)
    expected = fv.cumulants(fv.Probe(net, "categorical").fisher(repeated, labels, kind="empirical"))
    assert found.error == pytest.approx(expected.error, rel=1e-10)
    assert found.bound == pytest.approx(expected.bound, rel=1e-10)
