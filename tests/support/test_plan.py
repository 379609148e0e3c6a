"""How long things take, in words."""

import pytest

from fisherviz.support.plan import duration


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (1e-5, "< 1 ms"),
        (0.032, "32 ms"),
        (0.96, "960 ms"),
        (1.234, "1.2 s"),
        (42.0, "42 s"),
        (150.0, "2.5 min"),
        (7200.0, "2 h"),
    ],
)
def test_a_duration_has_two_digits_and_its_unit(seconds, said):
    assert duration(seconds) == said
