"""Tables in a terminal: no number is cut; what has no room is named."""

import re

import pytest

from fisherviz.commands.terminal import Column, print_table, say

CELLS = ["0.123 ± 0.045", "12,345", "9.0·10⁻⁴"]


def columns(count):
    rows = [Column("method", ["kfac", "kfac-tridiagonal", "nearest-kronecker"], right=False)]
    return [*rows, *(Column(f"metric number{k}", CELLS, frozenset([0]), importance=k) for k in range(count))]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
@pytest.mark.parametrize("count", [1, 4, 12])
def test_numbers_are_whole_and_columns_without_room_are_named(monkeypatch, capsys, width, count):
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(columns(count), "A title", "the page has them")
    text = capsys.readouterr().out
    table, _, rest = text.partition("No room in")
    assert max(map(len, table.splitlines())) <= width
    assert "…" not in text
    shown = sorted(int(k) for k in re.findall(r"number(\d+)", table))
    assert shown == list(range(count - len(shown), count))  # the least important are gone
    assert shown
    for cell in CELLS:
        assert table.count(cell) == len(shown)
    named = sorted(int(k) for k in re.findall(r"metric\s+number(\d+)", rest))
    assert named == [k for k in range(count) if k not in shown]
    assert bool(rest) == bool(named)
    assert not rest or "the page has them" in " ".join(rest.split())


def test_as_many_columns_stay_as_there_is_room_for(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    print_table(columns(12))
    lines = capsys.readouterr().out.splitlines()
    assert 80 - len(CELLS[0]) - 3 < max(map(len, lines)) <= 80


def test_sentences_break_between_words_and_tables_stay(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    say("word " * 30)
    assert max(len(line.rstrip()) for line in capsys.readouterr().out.splitlines()) <= 40
    table = f"head\n{'-' * 60}"
    say(table)
    assert capsys.readouterr().out == table + "\n"
    say("[bold]not markup[/]")
    assert "[bold]not markup[/]" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["net.py:ok: weights", ":warning:", "model.py:cat:"])
def test_names_between_colons_are_no_emoji(name, capsys):
    say(f"{name} is there.")
    print_table([Column("layer", [name]), Column("x", ["1"])], title=name)
    assert capsys.readouterr().out.count(name) == 3
