"""The page's paragraph on passes: its loops hold, and it finds a step that is another than the rule's."""

import random

import pytest
import torch

from benchmarks.trust import passes
from benchmarks.trust.loops import LOOPS, Trial
from benchmarks.trust.passes import broken, presets, tried, words
from benchmarks.trust.random_loops import Walk
from fisherviz.optim.evidence import Gradients

CHOSEN = [
    "NaturalGradient exact, mc", "CWNGD, empirical", "KFAC plain, exact", "KFAC complete, exact", "TENGraD, empirical",
    "HessianFree, exact", "SubsampledNaturalGradient same, exact", "FOOF averaged", "KFAC block-tridiagonal, exact",
]  # fmt: skip
BY_NAME = {name: run for loops in LOOPS.values() for name, run in loops.items()}


# two of each kind; the others in the long run
QUICK = {name for loops in LOOPS.values() for name in list(loops)[:2]}


@pytest.mark.parametrize(
    "turn",
    [pytest.param(turn, id=name, marks=[] if name in QUICK else pytest.mark.soak) for turn, name in enumerate(BY_NAME)],
)
def test_a_loop_steps_by_the_passes_that_count_or_says_why_not(turn):
    chosen = CHOSEN[turn % len(CHOSEN)]
    how, worst, said = tried(list(BY_NAME.values())[turn], *presets()[chosen])
    assert how != "wrong", (chosen, worst, said)
    assert how in ("warned", "refused") or list(BY_NAME)[turn] not in LOOPS["must be said"]


@pytest.mark.parametrize("seed", [pytest.param(s, marks=[] if s < 4 else pytest.mark.soak) for s in range(12)])
def test_a_loop_drawn_at_random_does_too(seed):
    walk, chosen = Walk(seed), random.Random(seed).choice(sorted(presets()))
    how, worst, said = tried(walk, *presets()[chosen], seed)
    assert how != "wrong", (chosen, walk.done, worst, said)


@pytest.mark.parametrize("chosen", ["NaturalGradient layer, exact", "KFAC block-tridiagonal, exact"])
def test_an_optimizer_that_counts_what_was_dropped_is_found(chosen, monkeypatch):
    monkeypatch.setattr(Gradients, "_gone", lambda self: set())
    how, worst, _ = tried(LOOPS["gradients dropped"]["zero_grad"], *presets()[chosen])
    assert how == "wrong"
    assert worst > 0.1


def test_an_optimizer_that_does_not_hear_of_other_gradients_is_found(monkeypatch):
    monkeypatch.setattr(Gradients, "unexplained", lambda self, layer: False)
    loop = LOOPS["must be said"]["a module called by itself"]
    assert tried(loop, *presets()["FOOF"])[0] == "wrong"


def test_a_raw_error_is_no_refusal():
    def raw(t: Trial) -> None:
        torch.zeros(2) @ torch.zeros(3)

    assert tried(raw, *presets()["FOOF"])[0] == "wrong"


def test_what_is_wrong_is_named_and_counted():
    row = {"loops": 1, "tried": 2, "equal": 1, "warned": 0, "refused": 0, "worst": 1e-15}
    found = {
        "optimizers": 3,
        "actions": 4,
        "kinds": {"one": row},
        "random": passes._row(0) | {"steps": 0},
        "wrong": [{"what": "a loop, FOOF", "difference": 0.5, "said": ""}],
    }
    assert broken(found) == ["a loop, FOOF: the step differs by 5.0e-01, and what was said is ''"]
    text = "\n".join(words(found))
    assert "Of 2 trainings 1 took another step without a word" in text
    assert "| one | 1 | 2 | 1 | 0 | 0 | 1e-15 |" in text
