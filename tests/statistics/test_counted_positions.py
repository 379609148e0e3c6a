"""Input factors over the positions that count, where examples have one, several, all or none of them."""

import pytest
import torch

from fisherviz.capture.captures import Capture
from fisherviz.capture.tokens import TokenCapture
from fisherviz.statistics import InputFactor
from tests.oracles.checks import assert_matches


@pytest.mark.parametrize("setting", ["expand", "reduce", "sum"])
@pytest.mark.parametrize("groups", [1, 2])
def test_input_factors_take_each_examples_own_number_of_positions(setting, groups):
    counted = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    shape = (4, 3, 5) if groups == 1 else (4, 3, groups, 5)
    a = torch.randn(*shape, generator=generator, dtype=torch.float64)
    g = torch.zeros(1, 4, 3, *shape[2:-1], 2, dtype=torch.float64)
    expected = torch.zeros(groups, 5, 5, dtype=torch.float64)
    for inputs, mask in zip(a.view(4, 3, groups, 5), counted, strict=True):
        for h in range(groups):
            rows = inputs[mask, h]
            if not len(rows):
                continue
            if setting == "reduce":
                mean = rows.mean(0)
                expected[h] += torch.outer(mean, mean)
            else:
                expected[h] += rows.T @ rows / (len(rows) if setting == "expand" else 1)
    found = InputFactor("0", setting).contribution(Capture(a, g, counted))
    assert_matches(found, expected[0] if groups == 1 else expected, 1e-12)


@pytest.mark.parametrize("setting", ["expand", "sum"])
@pytest.mark.parametrize("counts", [False, True], ids=["all positions", "some positions"])
def test_tokens_are_counted_at_each_examples_own_positions(setting, counts):
    counted = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    read, weights = torch.tensor([[0, 1, 2], [1, 1, 0], [2, 4, 2], [3, 3, 3]]), torch.arange(12.0).view(4, 3).double()
    expected = torch.zeros(5, dtype=torch.float64)
    for n in range(4):
        there = counted[n] if counts else torch.ones(3, dtype=torch.bool)
        for t in range(3):
            if there[t]:
                expected[read[n, t]] += weights[n, t] ** 2 / (int(there.sum()) if setting == "expand" else 1)
    capture = TokenCapture(read, weights, torch.zeros(1, 4, 3, 2).double(), 5, counted if counts else None)
    assert_matches(InputFactor("0", setting).contribution(capture), expected, 1e-12)
