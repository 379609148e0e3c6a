"""What a page is made of: comparisons under headings."""

from __future__ import annotations

from dataclasses import dataclass

from fisherviz.results.comparison import Comparison

PAPER_SETTING = "kfac-figure-2"
"""meta["settings"]["setting"] of the K-FAC paper's example network."""


@dataclass(frozen=True)
class Section:
    """One comparison of the page under a heading of its own.

    Args:
        title: the heading.
        comparison: what it shows.
        intro: a sentence below the heading.
        slug: folder of its files inside the report, "" for the report's own.
    """

    title: str
    comparison: Comparison
    intro: str = ""
    slug: str = ""
