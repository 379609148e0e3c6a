"""A pytest plugin: while a test runs, every function of the core that mutmut can mutate raises; see `mutants_sampled`.

A test that passes all the same has not looked at what they give.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest
from mutmut.mutation.trampoline import set_mutant_under_test


def pytest_configure() -> None:
    """Modules and parameters of tests are made with the functions as they are."""
    set_mutant_under_test("none.none")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Raise in the test, not in its fixtures."""
    set_mutant_under_test("fail")
    try:
        return (yield)
    finally:
        set_mutant_under_test("none.none")
