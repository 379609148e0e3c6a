"""Claims, verdicts, and the files and pages that keep them."""

import json
import math

import pytest

from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.records import load, record
from fisherviz.papers.trials.work import FORMAT, Run, commit, kept

RUN = Run("smoke", progress=False)


def claim(holds=True, departures=(), **more):
    return Claim("it is so", "figure 9", "0.5 | 1", "at most 1", holds, departures, **more)


def outcome(*rows, picture=None):
    return Outcome(rows, "here", "here and now", "A picture.", picture)


# Verdicts and files


@pytest.mark.parametrize(
    ("holds", "departures", "verdict"),
    [
        (True, (), "reproduced"),
        (False, (), "not reproduced"),
        (True, ("other data",), "different setting"),
        (False, ("other data",), "different setting"),
    ],
)
def test_the_verdict_follows_from_rule_and_setting(holds, departures, verdict):
    assert claim(holds, departures).verdict == verdict


def test_exhibits_do_not_touch_each_others_rows(tmp_path):
    record(tmp_path, "b.fig1", "P 2, B", "it", outcome(claim(), claim(False)), Run("smoke"))
    record(tmp_path, "a.fig1", "P 1, A", "it", outcome(claim(departures=("other data",)), picture=b"png"), Run("smoke"))
    record(tmp_path, "b.fig1", "P 2, B", "it", outcome(claim()), Run("desk"))
    known = load(tmp_path)
    assert list(known) == ["a.fig1", "b.fig1"]
    assert [len(known[name]["claims"]) for name in known] == [1, 1]
    assert known["b.fig1"]["run"]["scale"] == "desk"
    assert (tmp_path / "a.fig1.png").read_bytes() == b"png"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md", "a.fig1.png", "a.md", "b.md", "claims.json", "claims.md",
    ]  # fmt: skip


def test_the_page_has_one_row_per_claim_with_its_rule_and_verdict(tmp_path):
    odd = claim(False, ("other data",), sensitivity="elsewhere 2")
    record(tmp_path, "a.fig1", "Paper 1, figure 1", "one thing", outcome(claim(), odd), RUN)
    record(tmp_path, "a.fig2", "Paper 1, figure 2", "another", outcome(claim(False)), RUN)
    record(tmp_path, "b.fig1", "Paper 2, figure 1", "a third", outcome(claim()), RUN)
    page = (tmp_path / "a.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| it is so")]
    assert rows[:2] == [
        "| it is so | figure 9 | 0.5 \\| 1 | at most 1 | here | **reproduced** |",
        "| it is so | figure 9 | 0.5 \\| 1 (elsewhere 2) | at most 1 | here "
        "| **different setting**: other data (the rule does not hold) |",
    ]
    summary = [
        line for line in (tmp_path / "claims.md").read_text().splitlines() if line.startswith(("| Paper", "| all"))
    ]
    assert summary == ["| Paper 1 | 3 | 1 | 1 | 1 |", "| Paper 2 | 1 | 1 | 0 | 0 |", "| all | 4 | 2 | 1 | 1 |"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}'])
def test_a_damaged_folder_is_refused(tmp_path, text):
    (tmp_path / "claims.json").write_text(text)
    with pytest.raises(ValueError, match=r"claims.json .*; delete it or choose another folder"):
        load(tmp_path)


def test_a_number_that_is_none_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        record(tmp_path, "a.fig1", "A", "it", outcome(claim(values={"x": math.nan})), RUN)
    assert list(tmp_path.iterdir()) == []


def test_what_diverged_has_no_number_in_the_file(tmp_path):
    record(
        tmp_path,
        "a.fig1",
        "A",
        "it",
        outcome(claim(values={"loss": math.inf, "accuracy": -math.inf, "other": 0.5})),
        RUN,
    )
    assert load(tmp_path)["a.fig1"]["claims"][0]["values"] == {"other": 0.5}


def test_another_reading_of_a_claim_is_not_counted_again(tmp_path):
    record(tmp_path, "a.fig1", "Paper 1, figure 1", "it", outcome(claim(), claim(False, repeats=True)), RUN)
    assert "| Paper 1 | 1 | 1 | 0 | 0 |" in (tmp_path / "claims.md").read_text()
    assert "not counted again" in (tmp_path / "a.md").read_text()
    assert "Claims: 1 reproduced." in (tmp_path / "README.md").read_text()


def test_a_rule_that_was_changed_after_a_run_shows_both_verdicts(tmp_path):
    changed = claim(False, earlier_rule="at most 2", earlier_holds=True)
    record(tmp_path, "a.fig1", "Paper 1, figure 1", "it", outcome(changed), RUN)
    assert "| at most 1; before: at most 2, which holds |" in (tmp_path / "a.md").read_text()


def test_the_measurements_behind_an_exhibit_are_kept_with_seed_and_commit(tmp_path):
    run = Run("smoke", work=tmp_path / "work", used={})
    curve = [{"step": i, "loss": 1.0 / (i + 1)} for i in range(5)]
    kept({"seed": 3, "steps": 4}, lambda: {"curve": curve}, run)
    record(tmp_path, "a.fig1", "Paper 1, figure 1", "it", outcome(claim()), run)
    (line,) = (tmp_path / "a.fig1.runs.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["what"] == {"format": FORMAT, "seed": 3, "steps": 4}
    assert found["made"]["commit"] == commit()
    assert found["curve"] == [curve[0], curve[-1]]


def test_the_gallery_shows_picture_paper_verdict_and_command(tmp_path):
    record(tmp_path, "a.fig1", "Paper 1, figure 1: a thing", "a thing", outcome(claim(), picture=b"png"), RUN)
    page = (tmp_path / "README.md").read_text()
    assert "[![Figure 1: a thing](a.fig1.png)](a.md#figure-1-a-thing-afig1)" in page
    assert "The paper shows: a thing." in page
    assert "`fisherviz papers --only a.fig1 --scale smoke`" in page


def test_exhibits_that_an_older_release_recorded_still_stand(tmp_path):
    row = {"statement": "it was so", "paper": "figure 1", "measured": "1", "rule": "at most 2", "holds": True,
           "departures": [], "sensitivity": "", "values": {}, "verdict": "reproduced"}  # fmt: skip
    old = {"title": "Paper 1, figure 1: a thing", "run": {"scale": "desk", "seed": 0, "device": "cpu"},
           "setting": "there", "details": "then", "caption": "Old.", "picture": None, "claims": [row]}  # fmt: skip
    (tmp_path / "claims.json").write_text(json.dumps({"a.fig1": old}))
    record(tmp_path, "a.fig2", "Paper 1, figure 2", "it", outcome(claim()), RUN)
    page = (tmp_path / "a.md").read_text()
    assert "| it was so | figure 1 | 1 | at most 2 | there | **reproduced** |" in page
    assert "| Paper 1 | 2 | 2 | 0 | 0 |" in (tmp_path / "claims.md").read_text()


def test_a_protocol_keeps_the_order_of_its_columns_when_another_exhibit_is_recorded(tmp_path):
    rows = ({"method": "M", "grid": "lr 0.1", "chosen": "lr 0.1"},)
    found = Outcome((claim(repeats=True),), "here", "then", "A picture.", None, rows)
    record(tmp_path, "a.fig1", "Paper 1, figure 1", "it", found, RUN)
    record(tmp_path, "a.fig2", "Paper 1, figure 2", "it", outcome(claim()), RUN)
    assert "| method | grid | chosen |\n| --- | --- | --- |\n| M | lr 0.1 | lr 0.1 |" in (tmp_path / "a.md").read_text()
    assert "Claims: those of other exhibits, read otherwise." in (tmp_path / "README.md").read_text()
