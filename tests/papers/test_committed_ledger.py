"""The repository's own ledger: a row or a caption changed by hand would make the papers' command refuse the folder."""

from pathlib import Path

import pytest

from fisherviz.papers.ledger.pages import pages
from fisherviz.papers.ledger.records import load
from fisherviz.support.checksums import opened_json

FIGURES = Path(__file__).parents[2] / "figures"


def test_its_pages_say_what_its_rows_say():
    known = load(FIGURES)
    assert known
    for name, page in pages(known).items():
        assert (FIGURES / name).read_text(encoding="utf-8") == page, name
    for name, exhibit in known.items():
        assert exhibit["picture"] is None or (FIGURES / exhibit["picture"]).exists(), name


@pytest.mark.parametrize("path", sorted(FIGURES.glob("*.runs.jsonl")), ids=lambda path: path.name)
def test_its_measurements_are_as_they_were_written(path):
    assert all(opened_json(line) for line in path.read_text(encoding="utf-8").splitlines())
