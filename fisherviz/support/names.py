"""Names of layers and methods in little room: what tells them apart stays, what they share goes.

Pictures, tables and the page label with `shortened`; whoever changes it may count on nothing but that names that differ
have labels that differ, and that all fit where that is possible.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

CUT = "…"
_WORD = re.compile(r"[._]?[^._]*")
_LEAST = 3
"""Letters to which a word may be cut."""
MORE = 6
"""Characters beyond the width that whole words may take before single letters stand for them."""
Words: TypeAlias = Sequence[Sequence[str]]
Plan: TypeAlias = Sequence[Sequence[int]]


def readable(name: str) -> str:
    """A name as text of one line; the root module's empty name becomes readable."""
    return visible(name).replace("\n", "?") or "(root)"


def visible(text: str) -> str:
    """A text whose characters all show: none moves a cursor, colours what follows or turns the direction of writing.

    Args:
        text: of one line or several.

    Returns:
        The text, with question marks in the places of characters that do not show.
    """
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)


def unwritable(name: str) -> str:
    """What keeps a name out of a saved file: "" where nothing does."""
    if "\0" in name:
        return "a NUL, at which an archive cuts it off"
    return "half of a surrogate pair, which is no text" if re.search("[\ud800-\udfff]", name) else ""


def no_formula(text: str) -> str:
    """A text that no spreadsheet takes for a formula, for a cell of a CSV file."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def short(name: str, width: int = 18) -> str:
    """One name, its middle cut where it is too long.

    Args:
        name: any text.
        width: most characters.

    Returns:
        The text of one line.
    """
    return _middle(readable(name), width)


def shortened(names: Iterable[str], width: int) -> list[str]:
    """Labels that fit where they can, and that differ wherever the names do.

    Words between dots and underscores that do not tell the names apart are cut first ("…0.attention…", of
    "encoder.blocks.0.attention.out" and its like), then the front that is not needed, then the longest words' middles.

    Args:
        names: of layers, for example; equal ones get equal labels.
        width: characters that a label should have at most; it has more where nothing shorter is its own.

    Returns:
        A label per name, in their order. Names that all fit are left alone.

    Raises:
        ValueError: the width is not positive.
    """
    if width < 1:
        raise ValueError(f"width must be a positive number of characters, got {width}.")
    names = list(names)
    given = list(dict.fromkeys(names))
    texts = _apart(given)
    labels = [short(texts[0], width)] if len(texts) == 1 else _labels(texts, width)
    return [dict(zip(given, labels, strict=True))[name] for name in names]


def _apart(names: Sequence[str]) -> list[str]:
    """Readable texts; those that only unprintable characters told apart are counted."""
    found = {name: name for name in names if readable(name) == name}
    taken = set(found)
    for name in names:
        if name not in found:
            text = readable(name)
            tries = itertools.chain([text], (f"{text} ({count})" for count in itertools.count(2)))
            found[name] = next(candidate for candidate in tries if candidate not in taken)
            taken.add(found[name])
    return [found[name] for name in names]


def _labels(texts: Sequence[str], width: int) -> list[str]:
    """The best labels that tell the texts apart, with as many characters more than `width` as that takes."""
    words = [_WORD.findall(text)[:-1] for text in texts]  # the last match is empty
    letters = [list(text) for text in texts]
    plans = [plan for plan in _plans(words) if len(set(_joined(words, plan))) == len(texts)]
    ways = [(plan, _joined(words, plan)) for plan in plans]
    last = [_joined(letters, plan) for plan in _plans(letters)]
    longest = max(map(len, texts), default=0)
    for room in range(width, longest):
        for plan, labels in ways:
            if _good(labels, room):
                return _joined(words, _grown(words, plan, room))
        cut = [[_joined_cut(*given, room) for given in zip(words, plan, strict=True)] for plan in plans]
        # letters alone are hard to read: they come where words would need much more room
        for labels in [*reversed(cut), *(last if room >= min(width + MORE, longest - 1) else [])]:
            if _good(labels, room):
                return labels
    return list(texts)


def _good(labels: Sequence[str], room: int) -> bool:
    """Whether all fit and no two are equal."""
    return all(len(label) <= room for label in labels) and len(set(labels)) == len(labels)


def _plans(words: Words) -> Iterator[Plan]:
    """Of each name the places of the words to keep: from the first to the last that tell; those that tell; fewer.

    Numbers that tell are always kept.
    """
    telling = _telling(words)
    yield [range(mine[0], mine[-1] + 1) if mine else range(1) for mine in telling]
    for front in range(max(map(len, words), default=0)):
        yield [
            [k for k in places if k >= front or mine[k].lstrip("._").isdigit()] or places[-1:]
            for mine, places in zip(words, telling, strict=True)
        ]


def _grown(words: Words, plan: Plan, room: int) -> Plan:
    """A plan with more words, as long as all labels fit.

    First those behind, of each name as far as the others already go; then one more behind of all, then before of all.
    """
    depth = max(kept[-1] for kept in plan if kept)
    plan = list(plan)
    taken = set(_joined(words, plan))
    for k, mine in enumerate(words):
        while plan[k] and plan[k][-1] < min(depth, len(mine) - 1):
            longer = [*plan[k], plan[k][-1] + 1]
            label = _join(mine, longer)
            if len(label) > room or label in taken:
                break
            plan[k] = longer
            taken.add(label)
    for step in (1, -1):
        while True:
            wider = [_wider(kept, step, len(mine)) for kept, mine in zip(plan, words, strict=True)]
            if wider == plan or not _good(_joined(words, wider), room):
                break
            plan = wider
    return plan


def _wider(kept: Sequence[int], step: int, length: int) -> Sequence[int]:
    if not kept:
        return kept
    return sorted({*kept, min(kept[-1] + 1, length - 1) if step > 0 else max(kept[0] - 1, 0)})


def _telling(words: Words) -> list[list[int]]:
    """Of each name, the places of the words at which names that begin alike go on differently."""
    following: dict[tuple[str, ...], set[str | None]] = {}
    for mine in words:
        for k in range(len(mine) + 1):
            following.setdefault(tuple(mine[:k]), set()).add(mine[k] if k < len(mine) else None)
    return [[k for k in range(len(mine)) if len(following[tuple(mine[:k])]) > 1] for mine in words]


def _joined(words: Words, plan: Plan) -> list[str]:
    return [_join(mine, kept) for mine, kept in zip(words, plan, strict=True)]


def _join(words: Sequence[str], kept: Sequence[int]) -> str:
    """The words kept, with a mark for each run of others."""
    text, last = "", -1
    for k in kept:
        text += words[k] if k == last + 1 else CUT + words[k].lstrip("._")
        last = k
    return text + (CUT if last < len(words) - 1 else "")


def _joined_cut(words: Sequence[str], kept: Sequence[int], room: int) -> str:
    """As `_join`, the longest words' middles cut as far as it takes to fit."""
    most, label = max(map(len, words)), _join(words, kept)
    while len(label) > room and most > _LEAST:
        most -= 1
        label = _join([_cut(word, most) for word in words], kept)
    return label


def _cut(word: str, most: int) -> str:
    lead = word[: len(word) - len(word.lstrip("._"))]
    return lead + _middle(word[len(lead) :], most)


def _middle(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}{CUT}{text[len(text) - tail :]}"
