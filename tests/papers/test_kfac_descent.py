"""K-FAC in batch mode on the example network: trials of λ₀, states that are kept, rules over seeds and γ."""

import math

import pytest
import torch

from fisherviz.papers.kfac import descent
from fisherviz.papers.kfac.dampings import FAR, NEAR, Sweep
from fisherviz.papers.kfac.descent import Recipe, arrive, descend, iterations, taken_words, tried
from fisherviz.papers.kfac.measures import shares
from fisherviz.papers.kfac.network import kfac_networks
from fisherviz.papers.trials.states import kept_state
from fisherviz.papers.trials.work import Run

SETTING = Recipe("digits", 100, 4, "xavier", 0, 1e-3, 0.7, 20)


def run_at(path):
    return Run("smoke", progress=False, work=path)


def faked(monkeypatch, taken):
    """Runs that reach the error after a number of iterations by λ₀."""

    def descend(one, run):
        errors = [1.0] * (taken[one.start] - 1) + [one.error]
        return {"errors": errors[: one.most], "gamma": 0.1}

    monkeypatch.setattr(descent, "descend", descend)


def test_a_trial_stops_where_the_best_before_it_arrived(monkeypatch):
    faked(monkeypatch, {1.0: 8, 0.1: 5, 0.01: 12})
    found = tried(SETTING, (1.0, 0.1, 0.01), Run("smoke"))
    assert [(one.start, one.most, taken) for one, taken in found.items()] == [
        (1.0, 20, 8), (0.1, 8, 5), (0.01, 5, math.inf),
    ]  # fmt: skip
    assert taken_words(found) == "8 from λ₀ = 1, 5 from λ₀ = 0.1, more than 5 from λ₀ = 0.01"


def test_no_trial_that_arrives_is_an_error(monkeypatch):
    faked(monkeypatch, {1.0: 21, 0.1: 30})
    with pytest.raises(RuntimeError, match="does not reach 70% error in 20 iterations from any"):
        tried(SETTING, (1.0, 0.1), Run("smoke"))


def test_iterations_to_an_error_are_counted_from_the_first():
    found = {"errors": [0.5, 0.2, 0.3, 0.1]}
    assert [iterations(found, error) for error in (0.5, 0.25, 0.1, 0.05)] == [1, 2, 4, math.inf]


def test_the_network_is_the_one_at_the_end_of_its_run(tmp_path):
    run = run_at(tmp_path)
    errors = descend(SETTING, run)["errors"]
    kept, again = arrive(SETTING, run), arrive(SETTING, Run("smoke", progress=False))
    inputs, targets = SETTING.load(run).train
    assert float((kept(inputs).argmax(1) != targets).double().mean()) == errors[-1] <= 0.7
    for name, value in kept.state_dict().items():
        torch.testing.assert_close(value, again.state_dict()[name], rtol=0, atol=0)


def test_a_state_is_kept_with_its_measurement_and_made_again_where_it_is_lost(tmp_path):
    calls = []

    def measure():
        calls.append(1)
        return {"value": 2.0}, {"weights": torch.ones(3)}

    for _ in range(2):
        found, state = kept_state({"a": 1}, measure, run_at(tmp_path))
        assert found["value"] == 2.0
        assert torch.equal(state["weights"], torch.ones(3))
    assert len(calls) == 1
    (path,) = tmp_path.glob("*.state")
    path.unlink()
    assert kept_state({"a": 1}, measure, run_at(tmp_path))[1]["weights"].sum() == 3
    assert len(calls) == 2
    assert path.exists()


def test_every_exhibit_notes_what_it_used_of_what_they_share(tmp_path):
    used = []
    for _ in range(2):
        run = run_at(tmp_path)
        kfac_networks(run).measured(shares)
        used.append(set(run.used))
    assert used[0] == used[1]
    assert sum("kfac matrices" in name for name in used[0]) == 2
    assert sum("kfac matrices" not in name for name in used[0]) == 3  # two trials, one of them a network, and a seed


@pytest.mark.parametrize(
    ("near", "own", "far", "holds", "held"),
    [
        (0.4, 0.4, 0.4, True, True),
        (0.6, 0.4, 0.4, False, True),
        (0.4, 0.4, 0.6, True, True),
        (0.4, 0.6, 0.4, False, False),
    ],
)
def test_a_rule_has_to_hold_at_each_gamma_that_the_search_could_choose(near, own, far, holds, held):
    low, _, high = NEAR
    values = {low: [0.4, 0.4], 1.0: [0.3, own], high: [0.4, near], FAR[0]: [0.4, far], FAR[1]: [0.4, 0.4]}
    found = Sweep(values, lambda value: value <= 0.5)
    assert (found.holds, found.held) == (holds, held)
    broken = "0.50 (0.40 to 0.60), which breaks the rule on 1 of 2 seeds"
    assert (f"at 1.7 γ: {broken};" in found.words()) == (near > 0.5)
    assert (f"at 0.1 γ: {broken}, outside the rule" in found.words()) == (far > 0.5)
