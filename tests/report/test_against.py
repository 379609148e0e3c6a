"""Two reports on one page: numbers matched by name, changes marked by what they mean, the unmatched named."""

import json
import math
import os
import re
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import floats, sampled_from
from typer.testing import CliRunner

import fisherviz as fv
from fisherviz.cli import app
from fisherviz.commands.again import command_of
from fisherviz.commands.job import Job
from fisherviz.report import Section, write_report
from fisherviz.report.against import change
from fisherviz.results import metrics
from fisherviz.results.comparison import Comparison
from tests.factory import make_comparison
from tests.pages import undrawn
from tests.report.browser import chromium, opened
from tests.report.test_report import EVIL, Page


def scaled(comparison, factor, **meta):
    frame = comparison.frame.assign(value=comparison.frame["value"] * factor)
    return Comparison(frame, {**comparison.meta, **meta}, comparison.arrays)


def errors_alone(**options):
    """A comparison of one method with one metric: its report has few pictures."""
    whole = make_comparison(methods=("kfac",), **options)
    return Comparison(whole.frame.query("metric == 'relative_frobenius'"), whole.meta)


def test_a_change_is_judged_by_the_distance_from_the_best_value():
    assert change("relative_frobenius", 0.5, 0.4).verdict == "better"
    assert change("relative_frobenius", 0.5, 0.6).verdict == "worse"
    assert change("direction_cosine", 0.5, 0.6).verdict == "better"
    assert change("model_decrease", 0.9, 1.3).verdict == "worse"  # 1 is the best
    assert change("off_unit_share", 0.5, 0.6).verdict == "changed"  # a property is neither good nor bad
    assert change("bytes", 2048.0, 1024.0).verdict == "better"


@given(floats(0.0, 2.0), floats(0.0, 2.0))
def test_a_cosine_is_judged_by_its_distance_from_one(before, after):
    far, near = abs(1 - before), abs(1 - after)
    verdict = change("frobenius_cosine", before, after).verdict
    if metrics.show("frobenius_cosine", before) == metrics.show("frobenius_cosine", after):
        assert verdict == "same"
    elif abs(far - near) >= 0.0051 * far:
        assert verdict == ("better" if near < far else "worse")
    elif abs(far - near) <= 0.0049 * far:
        assert verdict == ("same" if abs(after - before) < 0.005 * before else "changed")


@given(floats(allow_nan=False), floats(allow_nan=False), sampled_from(["kl", "direction_cosine", "off_unit_share"]))
def test_a_change_is_told_whatever_the_numbers(before, after, name):
    """Infinite numbers, and those whose quotient is beyond floats, ended in raw errors."""
    told, back = change(name, before, after), change(name, after, before)
    assert -50 <= told.bar <= 50
    assert told.value is None or math.isfinite(told.value)
    assert told.bar == pytest.approx(-back.bar)
    if before == after:
        assert (told.verdict, told.bar) == ("same", 0)
    elif before and after and (before < 0) == (after < 0):
        assert told.bar >= 0 if after > before else told.bar <= 0
    assert {told.verdict, back.verdict} <= {"better", "worse", "same", "changed"}


def test_near_one_a_small_change_is_a_large_one():
    assert change("direction_cosine", 0.990, 0.994).verdict == "better"
    assert change("direction_cosine", 0.994, 0.990).verdict == "worse"
    assert change("direction_cosine", 0.9996, 0.9999).verdict == "same"  # both read 1.00
    assert change("model_decrease", 0.9, 1.1).verdict == "changed"  # as far from 1


def test_a_change_within_two_standard_errors_is_none():
    assert change("kl", 10.0, 11.0, noise=0.6).verdict == "same"
    assert change("kl", 10.0, 11.0, noise=0.4).verdict == "worse"
    assert change("kl", 10.0, 10.01).verdict == "same"  # below half a per cent


def test_the_change_is_said_in_per_cent_and_shown_by_a_bar():
    assert (change("kl", 10.0, 15.0).share, change("kl", 10.0, 5.0).share) == ("+50.0 %", "−50.0 %")
    assert change("kl", 10.0, 20.0).bar == pytest.approx(50)
    assert change("kl", 10.0, 5.0).bar == pytest.approx(-50)
    assert change("kl", 10.0, 10 * 2**0.5).bar == pytest.approx(25)
    assert change("model_decrease", -10.0, -20.0).bar == pytest.approx(-50)
    assert change("kl", 10.0, 1000.0).bar == 50
    missing = change("kl", None, 3.0)
    assert (missing.before, missing.after, missing.verdict, missing.value) == ("–", "3.00", "", None)


def test_both_values_of_every_method_stand_on_the_page(tmp_path):
    first = make_comparison(methods=("kfac", "foof"))
    second = scaled(first, 0.5, kind="mc")
    text = fv.compare_reports(first, second, tmp_path / "p.html", names=("epoch 1", "epoch 9")).read_text()
    page = Page(text)
    assert "from 0.620, −50.0 %" in page.text
    assert "0.310" in page.text
    assert "better for 2 of 2 methods" in page.text
    assert "kind of Fisher" in page.text
    assert page.text.index("exact") < page.text.index("mc")
    assert page.text.count("epoch 9") > 3
    assert "http" not in text.replace("http-equiv", "")


def test_what_has_no_partner_is_named(tmp_path):
    first = make_comparison(layers=("a", "b"), methods=("kfac", "foof"))
    second = make_comparison(layers=("b", "c"), methods=("kfac", "ekfac"))
    text = Page(fv.compare_reports(first, second, tmp_path / "p.html").read_text()).text
    for words in (
        "Layers in “before” alone: a.", "Layers in “after” alone: c.", "Methods in “before” alone: foof.",
        "Methods in “after” alone: ekfac.",
    ):  # fmt: skip
        assert words in text


def test_sections_of_reports_are_matched_by_title(tmp_path):
    one, other = errors_alone(), errors_alone(layers=("x", "y"))
    for name, sections in (
        ("first", [Section("Jointly", one), Section("Alone", other, slug="layers")]),
        ("second", [Section("Jointly", scaled(one, 1.25)), Section("More", other, slug="more")]),
    ):
        write_report(tmp_path / name, sections)
    page = Page(fv.compare_reports(tmp_path / "first", tmp_path / "second", tmp_path / "p.html").read_text())
    assert "Sections in “before” alone: Alone." in page.text
    assert "Sections in “after” alone: More." in page.text
    assert "from 0.620, +25.0 %" in page.text
    one.save(tmp_path / "saved")  # a comparison alone is a report of one section
    again = Page(fv.compare_reports(tmp_path / "saved", one, tmp_path / "q.html").read_text())
    assert "Both were made with the same settings." in again.text


def test_reports_without_anything_in_common_are_refused(tmp_path):
    one = errors_alone()
    two = {"A": one, "B": one}
    with pytest.raises(ValueError, match="no section in common: 'A', 'B' and 'C', 'D'"):
        fv.compare_reports(two, {"C": one, "D": one}, tmp_path / "p.html")
    with pytest.raises(ValueError, match="holds no saved comparison"):
        fv.compare_reports(tmp_path, one, tmp_path / "p.html")
    write_report(tmp_path / "r", one)
    (tmp_path / "r" / "report.json").write_text("{")
    with pytest.raises(ValueError, match=r"report\.json is damaged"):
        fv.compare_reports(tmp_path / "r", one, tmp_path / "p.html")


def test_hostile_names_stay_text(tmp_path):
    comparison = make_comparison(layers=(EVIL, "b"), methods=(EVIL,))
    other = scaled(comparison, 2.0, settings={EVIL: EVIL})
    text = fv.compare_reports(comparison, other, tmp_path / "p.html", names=(EVIL, EVIL + "2")).read_text()
    assert len(Page(text).all("script")) == 1
    assert Page(text).text.count(EVIL) > 5


def test_the_page_asks_for_nothing_and_sorts_by_the_change(tmp_path):
    first = make_comparison()
    rng = np.random.default_rng(0)
    second = Comparison(
        first.frame.assign(value=first.frame["value"] * rng.uniform(0.5, 2, len(first.frame))), first.meta
    )
    path = fv.compare_reports(first, second, tmp_path / "p.html")
    with chromium() as browser, opened(browser, path, width=390, color_scheme="dark") as page:
        page.locator("button.sort").nth(1).click()
        found = page.locator("tbody td:nth-child(2)[data-value]").evaluate_all("(c) => c.map((e) => +e.dataset.value)")
        assert found == sorted(found)
        assert len(found) == len(first.methods)
        assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_the_command_line_is_quoted_and_complete():
    job = Job(model="nets.mine:build", weights="my net.pt", data="mnist:16", methods=("kfac", "foof"), damping=0.1)
    words = command_of(job)
    assert words.startswith("fisherviz report --model nets.mine:build --weights 'my net.pt' --data mnist:16")
    assert "--methods kfac,foof" in words
    assert "--damping 0.1" in words
    assert "--examples 2000" in words
    assert "None" not in words


def test_a_path_that_is_no_text_is_written_and_comes_back_out_of_the_command(tmp_path, monkeypatch):
    undrawn(monkeypatch)
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"r\xe9'p\\ort")
    command = command_of(Job(out=name, weights=name))
    run = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True)
    words = [os.fsdecode(word) for word in run.stdout.split(b"\0")]
    assert words[words.index("--weights") + 1] == words[words.index("--out") + 1] == name
    given = ["report", "--methods", "diagonal", "--examples", "20", "--layers", "layer6", "--quiet", "--out", name]
    done = CliRunner().invoke(app, [*given, "--metrics", "relative_frobenius"])
    assert done.exit_code == 0, done.output
    assert r" --out $'r\xe9\'p\\ort' " in fv.load_comparison(name).meta["command"]
    assert write_report("titled", fv.load_comparison(name), title=name).is_dir()


def test_the_command_of_a_report_makes_it_again(tmp_path, monkeypatch):
    undrawn(monkeypatch)
    monkeypatch.chdir(tmp_path)
    given = ["report", "--methods", "kfac,diagonal", "--examples", "60", "--layers", "layer5,layer6"]
    metrics = ["--metrics", "relative_frobenius"]
    assert CliRunner().invoke(app, [*given, *metrics, "--quiet", "--out", "one"]).exit_code == 0
    facts = json.loads((tmp_path / "one" / "comparison.json").read_text())["meta"]
    command = facts["command"].split()
    assert command[0] == "fisherviz"
    again = CliRunner().invoke(app, [*command[1:], "--out", "two", "--quiet", "--against", "one"])
    assert again.exit_code == 0, again.output
    for folder in ("", "layers"):
        one, two = (fv.load_comparison(tmp_path / name / folder) for name in ("one", "two"))
        assert one.frame.equals(two.frame)
    text = (tmp_path / "two" / "against.html").read_text()
    assert re.search(r"better for 0 of 2 methods, worse for 0, the same for 2", text)
    wrong = CliRunner().invoke(app, ["report", "--against", "nothing"])
    assert wrong.exit_code != 0


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (1.0, 1.5, "+50.0 %"),
        (2.0, 1.0, "−50.0 %"),
        (1.0, 40.0, "× 40"),
        (-1.0, -40.0, "× 40"),  # of the same sign: a step that takes forty times the increase
        (-1.0, -1.5, "−50.0 %"),
        (-1.0, 40.0, "sign changed"),
        (0.5, -0.1, "sign changed"),
        (0.0, 1.0, ""),
        (1.0, float("inf"), ""),
    ],
)
def test_a_change_says_by_how_much_and_when_its_sign_changed(before, after, said):
    assert change("model_decrease", before, after).share == said
