"""Errors as sentences: the option first, then what was raised and where in the user's code."""

import pytest

from fisherviz.support.choices import did_you_mean
from fisherviz.support.errors import OptionError, option, sentence


def compiled(tmp_path, source):
    path = tmp_path / "mine.py"
    path.write_text(source)
    found = {}
    exec(compile(source, str(path), "exec"), found)
    return found["f"]


def caught(function):
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def f():\n    raise KeyError('lost')", "KeyError: 'lost' (mine.py, line 2, in f)"),
        ("def f():\n    assert 1 > 2", "AssertionError (mine.py, line 2, in f)"),
        ("def f():\n    raise ValueError('a\\n  b')", "ValueError: a b (mine.py, line 2, in f)"),
        ("import json\ndef f():\n    json.loads('[')", "JSONDecodeError: "),  # raised in a library, called by the user
    ],
)
def test_the_users_own_errors_keep_type_and_place(tmp_path, source, told):
    text = sentence(caught(compiled(tmp_path, source)))
    assert text.startswith(told)
    assert text.endswith(", in f)")


def test_the_packages_own_errors_are_their_sentence_with_the_users_line(tmp_path):
    source = "from fisherviz import datasets\ndef f():\n    datasets.load('mnst')"
    text = sentence(caught(compiled(tmp_path, source)))
    assert text == "there is no data set 'mnst'; did you mean 'mnist'? (mine.py, line 3, in f)"


def test_a_cause_tells_the_place_where_the_error_does_not(tmp_path):
    own = compiled(tmp_path, "def f():\n    raise KeyError('lost')")
    with pytest.raises(OptionError, match=r"^--model: KeyError: 'lost' \(mine.py, line 2, in f\)$"), option("--model"):
        own()


@pytest.mark.parametrize("known", [("kfac", "kfra", "ekfac"), ("kfra", "kfac", "ekfac")])
def test_of_names_that_are_as_near_the_first_on_the_list_is_meant(known):
    assert did_you_mean("kfca", known) == f"; did you mean {known[0]!r}?"
    assert did_you_mean("ekfc", known) == "; did you mean 'ekfac'?"
    assert did_you_mean("nothing", known) == "."
