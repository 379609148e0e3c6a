"""Labels that fit, and that tell apart what the names tell apart."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherviz.support.names import CUT, no_formula, short, shortened, visible

WORDS = st.sampled_from(
    ["encoder", "blocks", "0", "1", "10", "attention", "attention_norm", "self", "query", "out", ""]
)
LAYERS = st.lists(WORDS, max_size=6).map(".".join)
NAMES = st.one_of(LAYERS, st.text("ab.\x00_", max_size=12), st.text(max_size=8))


@settings(deadline=None)
@given(st.lists(NAMES, max_size=12), st.integers(1, 30))
def test_labels_differ_exactly_where_names_do(names, width):
    labels = shortened(names, width)
    assert len(labels) == len(names)
    assert len(set(zip(names, labels, strict=True))) == len(set(labels)) == len(set(names))


@settings(deadline=None)
@given(st.lists(NAMES, max_size=12), st.integers(1, 30))
def test_labels_are_text_of_one_line(names, width):
    assert all(label.isprintable() and label for label in shortened(names, width))


@settings(deadline=None)
@given(st.lists(LAYERS.filter(bool), min_size=1, max_size=12))
def test_names_that_fit_are_left_alone(names):
    assert shortened(names, max(map(len, names))) == names


@settings(deadline=None)
@given(st.lists(LAYERS.filter(bool), min_size=1, max_size=12, unique=True), st.integers(1, 30))
def test_a_label_is_made_of_its_names_letters_in_their_order(names, width):
    for name, label in zip(names, shortened(names, width), strict=True):
        rest = iter(name)
        assert all(letter in rest for letter in label.replace(CUT, ""))


@given(st.lists(st.integers(0, 999), min_size=2, max_size=12, unique=True), st.integers(1, 30))
def test_numbers_that_tell_names_apart_are_never_cut(numbers, width):
    names = [f"model.layers.{k}.attention.query_{k % 2}" for k in numbers] + ["head"]
    for number, label in zip(numbers, shortened(names, width), strict=False):
        assert str(number) in re.split(r"[^0-9]+", label)


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 100), st.integers(14, 40))
def test_labels_of_a_deep_network_fit(depth, width):
    ends = ("attention.in_projection", "attention.out_projection", "feedforward.first", "feedforward.second")
    labels = shortened([f"model.encoder.layers.{k}.{end}" for k in range(depth) for end in ends], width)
    assert max(map(len, labels)) <= width


@pytest.mark.parametrize(
    ("names", "width", "labels"),
    [
        (["encoder.blocks.0.attention.out", "encoder.blocks.0.linear.out"], 14, ["…attention.out", "…linear.out"]),
        (
            ["encoder.blocks.0.attention.projection", "encoder.blocks.1.attention.projection"],
            14,
            ["…0.attention…", "…1.attention…"],
        ),
        (
            ["layers.0.attention.query", "layers.1.attention.query", "layers.1.mlp.fc", "head"],
            16,
            ["…0.attention…", "…1.attention…", "…1.mlp…", "head"],
        ),
        (["number_of_the_layer_1", "number_of_the_layer_2"], 8, ["…layer_1", "…layer_2"]),
        (["a" * 30 + "b" + "a" * 30, "a" * 30 + "c" + "a" * 30], 8, ["…b…", "…c…"]),
        (["in", "out"], 3, ["in", "out"]),
        ([], 3, []),
        (["", "0"], 8, ["(root)", "0"]),
        (["a\x00", "a\x01", "a?"], 8, ["a? (2)", "a? (3)", "a?"]),
    ],
)
def test_what_tells_names_apart_stays(names, width, labels):
    assert shortened(names, width) == labels


def test_one_name_keeps_both_its_ends():
    assert shortened(["x" * 20 + "y" * 20], 7) == [short("x" * 20 + "y" * 20, 7)] == ["xxx…yyy"]
    assert short("in", 7) == "in"


def test_a_width_without_room_for_a_letter_is_refused():
    with pytest.raises(ValueError, match="width must be a positive number of characters, got 0"):
        shortened(["a"], 0)


@given(st.text())
def test_what_is_visible_steers_no_terminal_and_keeps_what_shows(text):
    seen = visible(text)
    assert len(seen) == len(text)
    assert all(character.isprintable() or character == "\n" for character in seen)
    assert all(new == old for new, old in zip(seen, text, strict=True) if old.isprintable() or old == "\n")


@given(st.text())
def test_no_cell_is_a_formula(text):
    cell = no_formula(text)
    assert cell[:1] not in ("=", "+", "-", "@", "\t", "\r")
    assert cell.removeprefix("'") == text.removeprefix("'")
