"""The page's paragraph on networks drawn at random: what is drawn is right or refused, and a planted fault is found."""

import pytest
import torch

from benchmarks.trust import programs
from benchmarks.trust.random_programs import WAYS, Program, drawn, truth
from fisherviz.capture import evidence

SORTING = "examples sorted"


@pytest.mark.parametrize("seed", [pytest.param(s, marks=[] if s < 4 else pytest.mark.soak) for s in range(12)])
def test_a_network_drawn_at_random_has_the_fisher_of_its_examples_or_is_refused(seed):
    assert set(programs.asked(seed).values()) <= {"right", "refused"}


@pytest.mark.parametrize("seed", [pytest.param(s, marks=[] if s < 4 else pytest.mark.soak) for s in range(8)])
def test_optimizers_step_by_it(seed):
    assert set(programs.stepped(seed).values()) <= {"right", "refused"}


@pytest.mark.parametrize("name", WAYS)
def test_no_way_couples_the_examples(name):
    """Or what they are compared with, one example at a time, would be no truth."""
    torch.manual_seed(0)
    net = Program([name]).double().eval()
    for p in net.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(5, 3, 4).double()
    assert torch.allclose(net(x), torch.cat([net(x[n : n + 1]) for n in range(5)]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [2, 3])
def test_layers_that_sort_the_examples_are_found_in_batches_of_two_and_three(n):
    """Whatever the order is in which they come: the contents decide."""
    wrong = []
    for seed in range(6):
        torch.manual_seed(seed)
        net = Program(["every example twice", SORTING, "LayerNorm"]).double().eval()
        for p in net.parameters():
            torch.nn.init.normal_(p)
        x = torch.randn(n, 3, 4).double()
        F = programs.fv.Probe(net, "gaussian").fisher(x).to_dense()
        wrong.append(not torch.allclose(F, truth(net, x, "gaussian"), rtol=1e-9, atol=1e-12))
    assert not any(wrong)


def test_a_fault_that_is_planted_is_counted(monkeypatch):
    """Without evidence, layers on the batch reversed give each example another one's numbers."""
    seed = next(s for s in range(999) if drawn(s)[0].ways == ("the batch reversed",))
    monkeypatch.setattr(evidence.Evidence, "refuted_by", lambda self, truths: {})
    monkeypatch.setattr(evidence.Evidence, "refuted_by_sums", lambda self: ({}, frozenset()))
    monkeypatch.setattr(programs, "SIZES", (5,))
    assert "off by" in programs.asked(seed)["dense"]


def test_an_expert_without_rows_is_no_call():
    net = Program(["experts"]).double().eval()
    x = torch.ones(2, 3, 4).double()  # all rows are sent to the last
    F = programs.fv.Probe(net, "gaussian").fisher(x)
    assert torch.allclose(F.to_dense(), truth(net, x, "gaussian"))
    assert all(layer.structured for layer in F.space.layers[:2])


def test_words_count_what_was_found():
    counts = {"programs": 2, "right": 11, "refused": 1, "wrong": 0}
    found = {"ways": 3, "requests": ["dense"], "wrong": ["x"], "Fishers": counts, "steps": counts}
    assert programs.broken(found) == ["x"]
    assert "| 2 | 11 | 1 | 0 |" in "\n".join(programs.words(found))
