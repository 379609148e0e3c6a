"""The benchmarks' harness on networks of a few units: rows train, cycles are timed whole, saved rows stay."""

import json
import math
from dataclasses import replace
from itertools import count

import pytest
import torch

from benchmarks import cycles, depth, optim, running, scaling, scaling_table, steps, steps_table, table
from benchmarks.running import HERE

TINY = {
    steps.wide: lambda: steps.wide((6, 5, 5, 3), 8),
    steps.units: lambda: steps.units(4, 3, 8),
    steps.units_with_head: lambda: steps.units_with_head(4, 3, 8),
}


@pytest.fixture(autouse=True)
def threads():
    """The harness measures on one thread and on two."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", steps.ROWS)
def test_every_row_trains(name):
    row = replace(steps.ROWS[name], problem=TINY[steps.ROWS[name].problem])
    trainer = row.trainer(row.problem())
    before = [p.detach().clone() for p in trainer.problem.model.parameters()]
    for _ in range(4):
        trainer.step()
    assert math.isfinite(trainer.loss)
    after = trainer.problem.model.parameters()
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_a_whole_cycle_is_timed_and_every_position_takes_its_fastest_round():
    made = count()

    def step():
        return next(made)

    def clock(work):
        k = work()
        if k is None:
            return 2.0
        position, later = k % 20, k >= 2 * 20 + cycles.WARM_UP
        return (100.0 if position == 0 else 10.0) + (0.0 if later else 5.0)

    timing = cycles.measure_steps(step, lambda: None, cycle=20, rounds=3, wall=False, clock=clock)
    assert timing.seconds == pytest.approx((100 + 19 * 10) / 20)
    assert (timing.slowest, timing.usual, timing.sgd) == (100, 10, 2)
    assert timing.ratio == timing.seconds / 2


def test_operations_are_those_of_one_step():
    x = torch.ones(3, 4)
    timing = cycles.measure_steps(lambda: x @ x.T, lambda: x.T @ x, 4, 1, wall=False)
    assert timing.gflop == pytest.approx(2 * 3 * 4 * 3 / 1e9)
    assert timing.sgd_gflop == pytest.approx(2 * 4 * 3 * 4 / 1e9)


def test_the_depth_row_counts_memory_of_the_exact_fisher():
    parameters = sum(p.numel() for p in depth.problem(1).model.parameters())
    assert depth.peak_kib("exact", 1) > 4 * parameters**2 / 2**10 > depth.peak_kib("sgd", 1)


def test_neither_benchmark_destroys_the_other_ones_part(tmp_path, monkeypatch):
    for name in ("results.json", "optim.json"):
        (tmp_path / name).write_bytes((HERE / name).read_bytes())
    monkeypatch.setitem(steps.ROWS, "foof T=1", replace(steps.ROWS["foof T=1"], problem=TINY[steps.wide]))
    row = optim.run_one("foof T=1", peers=False, rounds=1)
    row["huge_pages"] = row["ours"]
    optim.save(tmp_path, "foof T=1", row)
    before, after = (json.loads((folder / "optim.json").read_text())["rows"] for folder in (HERE, tmp_path))
    assert after.pop("foof T=1")["ours"] == row["ours"]
    assert after == {name: kept for name, kept in before.items() if name != "foof T=1"}
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    analysis = "\n\n".join(table.part(json.loads((HERE / "results.json").read_text())))
    assert page.startswith(analysis)
    assert page[len(analysis) :].lstrip().startswith("# What a step costs")
    assert steps_table.line("foof T=1", row).startswith("foof T=1")


def test_the_page_is_what_the_saved_results_say():
    results = [json.loads((HERE / name).read_text(encoding="utf-8")) for name in table.FILES]
    assert (HERE / "README.md").read_text(encoding="utf-8") == table.page(*results)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["ASDL", "curvlinops"])
def test_the_peers_step_points_where_ours_does(name):
    from benchmarks.step_peers import PEERS, check

    peer = PEERS["kfac T=1"][name]
    if not peer.installed:
        pytest.skip(f"{peer.package} is not installed (bench extra)")
    problem = steps.wide((20, 30, 30, 5), 25)
    assert check(problem, peer)["cosine"] > 0.999
    step, before = peer.trainer(problem, 2), problem.copy()
    for _ in range(4):
        step()
    for old, new in zip(before.model.parameters(), problem.model.parameters(), strict=True):
        assert torch.equal(old, new)  # it trains a copy


def test_growth_is_drawn_and_told_from_what_was_measured(monkeypatch):
    monkeypatch.setattr(scaling, "ROUNDS", 1)
    found = scaling.cell(8, 6)
    assert set(found["requests"]) == set(scaling.REQUESTS)
    assert all(row["x"] > 0 and row["count"] > 0 for row in found["requests"].values())
    words = {name: words for name, (words, _) in scaling.REQUESTS.items()}
    results = {
        "width": {"8": found, "16": found},
        "examples": {"6": found},
        "words": words,
        "settings": {"inputs": 128, "classes": 10, "width": 8, "examples": 6},
        "machine": running.machine(),
    }
    page = "\n".join(scaling_table.part(results))
    assert all(text in page for text in words.values())
    assert scaling_table.draw(results).startswith(b"\x89PNG")
