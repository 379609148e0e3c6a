"""The quick part of a product of parameters holds every value, or every two; what is left is `soak`."""

from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.covering import covering

sizes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def combinations_in(rows, strength):
    return {
        (columns, tuple(row[c] for c in columns))
        for row in rows
        for columns in combinations(range(len(row)), min(strength, len(row)))
    }


@settings(max_examples=50, deadline=None)
@given(sizes, st.integers(1, 3), st.data())
def test_every_combination_that_occurs_is_kept(levels, strength, data):
    whole = list(product(*map(range, levels)))
    rows = data.draw(st.lists(st.sampled_from(whole), min_size=1, unique=True))
    chosen = covering(rows, strength)
    assert chosen == sorted(set(chosen))
    assert combinations_in([rows[at] for at in chosen], strength) == combinations_in(rows, strength)


@given(sizes)
def test_as_many_cases_as_the_longest_parameter_has_values(levels):
    assert len(covering(list(product(*map(range, levels))))) == max(levels)


def test_pairs_take_far_fewer_cases_than_the_product():
    whole = list(product(*map(range, (10, 6, 4, 3, 2))))
    assert 60 <= len(covering(whole, 2)) <= 70 < len(whole) == 1440


def test_values_of_the_shorter_parameters_take_turns():
    whole = list(product(range(12), range(4), range(3)))
    chosen = [whole[at] for at in covering(whole)]
    assert {row[1:] for row in chosen} == set(product(range(4), range(3)))
    assert all([row[1] for row in chosen].count(value) == 3 for value in range(4))


TESTED = """
import pytest

@pytest.mark.covering
@pytest.mark.parametrize(("number", "word"), [(1, "one"), (2, "two"), pytest.param(3, "three", marks=pytest.mark.soak)])
@pytest.mark.parametrize("letter", "abc")
def test_of_values(number, word, letter):
    pass

@pytest.mark.covering(2)
@pytest.mark.parametrize("third", [0, 1])
@pytest.mark.parametrize("second", [0, 1])
@pytest.mark.parametrize("first", [0, 1])
def test_of_pairs(first, second, third):
    pass
"""


@pytest.mark.parametrize(
    ("chosen", "values", "pairs"),
    [("not soak", 3, 4), ("soak", 6, 4), ("soak or not soak", 9, 8)],
)
def test_make_test_runs_the_kept_cases_and_soak_the_others(tmp_path, capsys, chosen, values, pairs):
    (tmp_path / "test_of_products.py").write_text(TESTED)
    arguments = [
        "-m",
        chosen,
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
        "--import-mode=importlib",
    ]
    assert pytest.main([*arguments, "-p", "tests.conftest", f"--rootdir={tmp_path}", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert (told.count("::test_of_values["), told.count("::test_of_pairs[")) == (values, pairs)
