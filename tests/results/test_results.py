"""What a Comparison is, and that what is saved is whole: exact round trips, also across interruptions."""

import io
import json
import os
import signal
import zipfile
from collections import OrderedDict
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherviz import Probe, compare
from fisherviz.approximations.registry import resolve
from fisherviz.results import metrics
from fisherviz.results.comparison import Comparison, load_comparison
from fisherviz.support import files
from fisherviz.support.checksums import opened_json, sealed_json
from tests.factory import METHODS, make_comparison


@pytest.fixture
def comparison():
    return make_comparison()


def assert_equal(a, b):
    pd.testing.assert_frame_equal(a.frame, b.frame, check_exact=True)
    assert a.meta == b.meta
    assert a.arrays.keys() == b.arrays.keys()
    for name, array in a.arrays.items():
        np.testing.assert_array_equal(array, b.arrays[name])


def test_the_frame_is_tidy(comparison):
    assert list(comparison.frame) == ["method", "row", "col", "metric", "value", "stderr"]
    assert comparison.frame["value"].dtype == np.float64
    assert comparison.methods == METHODS
    assert comparison.layers == ("0", "2", "4", "6")


def test_whole_and_blocks_select(comparison):
    assert comparison.whole("relative_frobenius")["kfac"] == 0.62
    assert "foof" not in comparison.whole("kl")
    diagonal = comparison.blocks("relative_frobenius")
    assert len(diagonal) == len(METHODS) * 4
    assert (diagonal["row"] == diagonal["col"]).all()
    assert len(comparison.blocks("relative_frobenius", diagonal=False)) == len(METHODS) * 16


def test_the_summary_has_one_row_per_method_closest_first(comparison):
    summary = comparison.summary()
    assert summary.index.name == "method"
    assert sorted(summary.index) == sorted(METHODS)
    assert summary["relative_frobenius"].is_monotonic_increasing
    assert summary.index[0] == "kfac-full"
    assert summary.loc["kfac", "direction_cosine"] == pytest.approx(0.69)
    assert "off_unit_share" not in summary


def test_a_metric_that_does_not_apply_is_a_missing_cell_and_never_nan(comparison):
    cell = comparison.summary().loc["foof", "kl"]
    assert cell is pd.NA
    assert comparison.summary()["relative_frobenius"].dtype == np.float64


def test_a_nan_is_refused_and_named(comparison):
    frame = comparison.frame.copy()
    frame.loc[(frame["method"] == "kfac") & (frame["metric"] == "kl"), "value"] = np.nan
    with pytest.raises(ValueError, match=r"kl of 'kfac' at \(all, all\) is not a number"):
        Comparison(frame)


def test_a_missing_column_is_named(comparison):
    with pytest.raises(ValueError, match=r"lacks the columns \['col'\]"):
        Comparison(comparison.frame.drop(columns="col"))


def test_meta_that_is_no_json_is_refused(comparison):
    with pytest.raises(ValueError, match="no JSON"):
        Comparison(comparison.frame, {"model": object()})
    with pytest.raises(ValueError, match="no JSON"):
        Comparison(comparison.frame, {"damping": float("nan")})


def test_it_prints_one_helpful_line_and_shows_itself_as_a_table(comparison):
    assert repr(comparison) == (
        "Comparison(10 methods, 4 layers, 96 parameters, exact Fisher, closest: kfac-full, 1 left out: see .notes)"
    )
    assert comparison._repr_html_().count("<tr>") == 11


def test_names_are_escaped_in_the_table():
    table = make_comparison(methods=("<script>alert(1)</script>",))._repr_html_()
    assert "<script" not in table
    assert "&lt;script&gt;" in table


def test_save_and_load_give_the_same_comparison(comparison, tmp_path):
    folder = comparison.save(tmp_path / "deep" / "result")
    assert sorted(path.name for path in folder.iterdir()) == [
        "arrays.npz", "comparison.json", "comparison.parquet",
    ]  # fmt: skip
    assert_equal(load_comparison(folder), comparison)


def estimated(comparison, metric="kl", error=1.25):
    """The same comparison with standard errors of one metric."""
    frame = comparison.frame.assign(stderr=np.where(comparison.frame["metric"] == metric, error, 0.0))
    return Comparison(frame, comparison.meta, comparison.arrays)


def test_standard_errors_are_saved_and_what_was_saved_without_them_is_exact(comparison, tmp_path):
    with_errors = estimated(comparison)
    assert_equal(load_comparison(with_errors.save(tmp_path / "new")), with_errors)
    assert set(with_errors.whole("kl", "stderr").values()) == {1.25}
    earlier = Comparison(comparison.frame.drop(columns="stderr"), comparison.meta, comparison.arrays)
    assert_equal(earlier, comparison)


def test_standard_errors_stand_beside_their_values(comparison):
    summary, plain = estimated(comparison).summary(), comparison.summary()
    assert list(summary.columns)[list(summary.columns).index("kl") :][:2] == ["kl", "kl_stderr"]
    assert list(plain.columns) == [name for name in summary if not name.endswith("_stderr")]
    assert list(estimated(comparison).summary(stderr=False).columns) == list(plain.columns)
    assert summary.loc["kfac", "kl_stderr"] == 1.25
    assert summary.loc["foof", "kl_stderr"] is pd.NA
    assert "<td>24.8 ± 1.2</td>" in estimated(comparison)._repr_html_()
    assert "±" not in comparison._repr_html_()


def test_the_table_is_ordinary_parquet_and_the_facts_ordinary_json(comparison, tmp_path):
    folder = comparison.save(tmp_path)
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "comparison.parquet"), comparison.frame)
    assert json.loads((folder / "comparison.json").read_text())["meta"]["examples"] == 1797


def test_arrays_are_float32(comparison, tmp_path):
    with np.load(comparison.save(tmp_path) / "arrays.npz") as archive:
        assert {archive[name].dtype for name in archive.files} == {np.dtype(np.float32)}
        assert "inverse-difference/kfac" in archive.files


def test_saving_again_replaces_and_leaves_other_files_alone(comparison, tmp_path):
    comparison.save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    other = make_comparison(layers=("a", "b"), seed=3)
    other.save(tmp_path)
    assert_equal(load_comparison(tmp_path), other)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way_is_named(comparison, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match=r"taken is a file; give the path of a directory"):
        comparison.save(tmp_path / "taken")


def test_nothing_to_load_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"holds no saved comparison: comparison.json cannot be read"):
        load_comparison(tmp_path)


@pytest.mark.parametrize("name", ["comparison.parquet", "arrays.npz"])
def test_a_truncated_file_is_refused(comparison, tmp_path, name):
    path = comparison.save(tmp_path) / name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"{name} is damaged or belongs to another comparison"):
        load_comparison(tmp_path)


def test_a_file_of_another_comparison_is_refused(comparison, tmp_path):
    one, two = comparison.save(tmp_path / "one"), make_comparison(seed=1).save(tmp_path / "two")
    (one / "comparison.parquet").write_bytes((two / "comparison.parquet").read_bytes())
    with pytest.raises(ValueError, match="belongs to another comparison"):
        load_comparison(one)


def test_passes_that_were_timed_are_not_read_as_counted(comparison, tmp_path):
    path = comparison.save(tmp_path / "c") / "comparison.json"
    path.write_text(sealed_json(opened_json(path.read_text()) | {"format": 1}))
    found = load_comparison(tmp_path / "c")
    assert "passes" in comparison.metrics
    assert set(found.metrics) == set(comparison.metrics) - {"passes"}
    assert found.notes[-1].startswith("passes are left out: an earlier release timed them")


def test_a_newer_format_is_refused(comparison, tmp_path):
    path = comparison.save(tmp_path) / "comparison.json"
    path.write_text(sealed_json(opened_json(path.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="format 99, this release reads up to 2; upgrade"):
        load_comparison(tmp_path)


def test_damaged_facts_are_refused(comparison, tmp_path):
    (comparison.save(tmp_path) / "comparison.json").write_text("{")
    with pytest.raises(ValueError, match="damaged or not a comparison's"):
        load_comparison(tmp_path)


@pytest.mark.parametrize("fatal", range(1, 8))
def test_killed_in_the_middle_of_saving_leaves_the_old_result_or_the_new_one(tmp_path, fatal):
    """A process is killed at the fatal-th write or rename; nothing of it cleans up afterwards."""
    old, new = make_comparison(layers=("a", "b")), make_comparison(layers=("a", "b"), seed=1)
    old.save(tmp_path)
    committed = fatal > 4  # three files are filled, the fourth call commits, three more move them
    contents = new.to_files()
    child = os.fork()
    if child == 0:
        calls = 0

        def counted(function):
            def call(*arguments):
                nonlocal calls
                calls += 1
                if calls == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments)

            return call

        files._fill = counted(files._fill)
        files.os.replace = counted(os.replace)
        files.write_together(tmp_path, contents)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert_equal(load_comparison(tmp_path), new if committed else old)
    third = make_comparison(layers=("a", "b"), seed=2)
    third.save(tmp_path)
    assert_equal(load_comparison(tmp_path), third)
    assert len(list(tmp_path.iterdir())) == 3


def test_one_file_is_written_whole(tmp_path, monkeypatch):
    path = files.write_whole(tmp_path / "page.html", "old")

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_whole(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]


def test_names_may_not_leave_the_directory(tmp_path):
    with pytest.raises(ValueError, match="leaves the directory"):
        files.write_together(tmp_path, {"../outside": b""})


def test_ctrl_c_while_arrays_are_packed_stays_ctrl_c(comparison, tmp_path, monkeypatch):
    once = zipfile.ZipFile.open

    def interrupted(*given, **options):
        once(*given, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(zipfile.ZipFile, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        comparison.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_saving_takes_the_same_bytes_twice(comparison):
    assert comparison.to_files()["comparison.json"] == comparison.to_files()["comparison.json"]
    assert pd.read_parquet(io.BytesIO(comparison.to_files()["comparison.parquet"])).equals(comparison.frame)


NUMBERS = st.floats(allow_nan=False)


@given(NUMBERS, st.floats(0, allow_nan=False), st.sampled_from(["kl", "relative_frobenius", "direction_cosine"]))
def test_what_is_shown_is_the_number_to_three_digits(value, error, name):
    """Infinite values with a standard error, and those below 1e-307, ended in raw errors."""
    shown = metrics.show(name, value, error)
    mantissa, _, rest = shown.removeprefix("(").partition(" ± ")
    mantissa, times, power = mantissa.partition("·10")
    power = rest.partition(")·10")[2] if shown.startswith("(") else power
    digits = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹−", "-0123456789-")
    exponent = int(power.translate(digits) or 0)
    plain = mantissa.translate(digits).replace(",", "").replace("∞", "inf")
    if "inf" in plain:
        assert float(plain) == value
    else:  # 1.8·10³⁰⁸, which 1.75·10³⁰⁸ is shown as, is beyond floats
        gap = abs(Decimal(f"{plain}e{exponent}") - Decimal(value))
        assert gap <= abs(Decimal(value)) * Decimal("0.006" if not times and abs(value) >= 1e-300 else "0.06")
    assert bool(rest) == (error != 0)


@pytest.mark.parametrize(
    ("name", "why"),
    [("a\0b", "a NUL, at which an archive cuts it off"), ("a\ud800b", "half of a surrogate pair, which is no text")],
)
def test_a_name_that_no_file_can_hold_is_refused(tmp_path, name, why):
    said = f"holds {why}; rename the method or the layer"
    columns = ["method", "row", "col", "metric", "value"]
    for row in ((name, "all", "all"), ("kfac", name, name)):
        with pytest.raises(ValueError, match=said):
            Comparison(pd.DataFrame([(*row, "kl", 1.0)], columns=columns, dtype=object), {})
    found = Comparison(pd.DataFrame([("kfac", "all", "all", "kl", 1.0)], columns=columns), {}, {name: np.ones(1)})
    with pytest.raises(ValueError, match=said):
        found.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    net = torch.nn.Sequential(OrderedDict({name: torch.nn.Linear(2, 2)}))
    with pytest.raises(ValueError, match=said):
        compare(Probe(net, "categorical").fisher(torch.zeros(1, 2)), ["kfac"])
    with pytest.raises(ValueError, match=f"label .* holds {why}; give this method another one"):
        resolve({name: "kfac"})


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("relative_frobenius", 0.36, "0.360"), ("relative_frobenius", 0.0, "0"), ("kl", 12.44, "12.4"),
        ("kl", 123456.0, "1.2·10⁵"), ("relative_max", 2.5e-7, "2.5·10⁻⁷"), ("kl", 1234.0, "1,234"),
        ("kl", float("inf"), "∞"), ("bytes", 512.0, "512 bytes"), ("bytes", 3 * 2.0**20, "3 MiB"),
        ("seconds", 0.0123, "12.3 ms"), ("seconds", 2.0, "2 s"),
    ],
)  # fmt: skip
def test_numbers_are_shown_as_people_read_them(name, value, text):
    assert metrics.show(name, value) == text


def test_a_standard_error_is_shown_with_two_digits():
    assert metrics.show("kl", 545934.7, 13953.4) == "(5.46 ± 0.14)·10⁵"
    assert metrics.show("inverse_frobenius", 0.3195, 0.00041) == "0.320 ± 4.1·10⁻⁴"
    assert metrics.show("kl", 367.2, 17.3) == "367 ± 17"
    assert metrics.show("kl", 20809.0, 716.0) == "20,809 ± 716"


def test_every_metric_of_the_design_is_defined():
    named = [
        "relative_frobenius", "relative_spectral", "relative_nuclear", "relative_max", "frobenius_cosine",
        "inverse_frobenius", "direction_cosine", "direction_error", "model_decrease",
        "model_decrease_rescaled", "kl", "off_unit_share",
        "seconds", "bytes", "passes",
    ]  # fmt: skip
    assert sorted(named) == sorted(metrics.METRICS)
    assert all(entry.formula and entry.meaning for entry in metrics.METRICS.values())
    assert metrics.metric("my_own").label == "my own"
