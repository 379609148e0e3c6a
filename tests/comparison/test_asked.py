"""What was asked for is measured or refused in one sentence with the way out, and what is left out has its reason."""

import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.comparison import planning
from fisherviz.comparison.budget import Budget
from fisherviz.results.metrics import METRICS, needing

METHODS = ["kfac", "diagonal"]


def single():
    torch.manual_seed(0)
    return nn.Linear(20, 3), torch.randn(12, 20)


def several():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(12, 12)


def large():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 30), nn.Tanh(), nn.Linear(30, 3)), torch.randn(
        12, 300
    )


def fisher(of, targets=True, kind="exact"):
    net, x = of()
    return fv.Probe(net, "categorical").fisher(x, torch.randint(3, (len(x),)) if targets else None, kind=kind)


@pytest.mark.covering(2)
@pytest.mark.parametrize(
    ("kind", "targets"), [("exact", True), ("exact", False), ("mc", True), ("mc", False), ("empirical", True)]
)
@pytest.mark.parametrize("written", [True, False], ids=["dense", "never formed"])
@pytest.mark.parametrize("of", [single, several])
def test_every_metric_alone_has_rows_or_is_refused_with_the_way_out(monkeypatch, of, written, kind, targets):
    if not written:
        monkeypatch.setattr(planning, "why_not_dense", lambda *given: "which are too many")
    for metric, entry in METRICS.items():
        if entry.needs == "direction" and not targets:
            with pytest.raises(
                ValueError, match=rf"nothing of {metric} can be .*no targets; pass them, or gradient=\.$"
            ):
                fv.compare(fisher(of, targets, kind), METHODS, metrics=[metric], progress=False)
            continue
        found = fv.compare(fisher(of, targets, kind), METHODS, metrics=[metric], progress=False)
        assert set(found.frame["metric"]) == {metric}
        assert found.methods == (() if entry.needs == "exact" else tuple(METHODS))


def test_every_metric_of_a_large_network_is_measured_or_refused_with_its_size():
    asked = fisher(large)
    for metric in METRICS:
        if metric in needing("matrix"):
            sentence = (
                rf"writing the matrices out for {metric} takes .*GiB, but .* are free on cpu; probe fewer layers="
            )
            with pytest.raises(MemoryError, match=sentence):
                fv.compare(asked, METHODS, metrics=[metric], progress=False)
        elif metric not in ("inverse_frobenius", "kl"):  # which take half a minute here, and are tested elsewhere
            assert not fv.compare(asked, METHODS, metrics=[metric], progress=False).frame.empty


def test_matrices_are_written_out_where_they_fit_and_cost_little(monkeypatch):
    assert planning.why_not_dense(fisher(several), {}, Budget((), False)) == ""
    needed = planning.dense_bytes(fisher(several))
    monkeypatch.setattr(fv.config, "_memory_budget", needed - 1)
    assert "may be taken; probe fewer layers=" in planning.why_not_dense(fisher(several), {}, Budget((), False))
    found = fv.compare(fisher(several), METHODS, damping=0.1, progress=False)
    assert not needing("matrix") & set(found.metrics)
    (note,) = [note for note in found.notes if note.startswith("relative_max, relative_nuclear are left out")]
    assert "like heatmaps and spectra: they need dense 131 x 131 matrices, which take" in note
    with pytest.raises(MemoryError, match="writing the matrices out for relative_max"):
        fv.compare(fisher(several), METHODS, metrics=["relative_max"], damping=0.1, progress=False)
    monkeypatch.setattr(fv.config, "_memory_budget", needed)
    assert needing("matrix") <= set(fv.compare(fisher(several), METHODS, damping=0.1, progress=False).metrics)


def test_of_both_ways_the_cheaper_one_is_taken_where_neither_is_cheap(monkeypatch):
    """Many examples make Gram matrices dear, few make them cheap."""
    monkeypatch.setattr(planning, "DENSE_MULTIPLY_ADDS", 0)
    net, _ = several()
    found = {}
    for examples in (4, 4000):
        asked = fv.Probe(net, "categorical").fisher(torch.randn(examples, 12))
        why = planning.why_not_dense(asked, {}, Budget((), False))
        dense, other = (
            sum(step.multiply_adds for step in planning._steps(asked, {}, written, Budget((), False))[1])
            for written in (True, False)
        )
        assert (why == "") == (dense <= other)
        found[examples] = why
    assert "times the multiply-adds; ask for them with metrics=" in found[4]
    assert found[4000] == ""


def test_what_is_left_out_of_single_layers_has_its_reason(monkeypatch):
    monkeypatch.setattr(planning, "why_not_dense", lambda *given: "which are too many")
    found = fv.compare(fisher(several), METHODS, damping=0.1, progress=False)
    assert any(
        note.startswith("of single layers") and "kl" in note and "that needs dense blocks" in note
        for note in found.notes
    )
    alone = fv.compare(fisher(single), METHODS, damping=0.1, progress=False)
    assert not any("single layers" in note for note in alone.notes)
