"""Numbers in sentences: short, and the same number again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fisherviz.support.numbers import three_digits
from fisherviz.support.plan import billions

_PLAIN = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def read(text):
    mantissa, power, exponent = text.partition("·10")
    return float(mantissa) * 10.0 ** int(exponent.translate(_PLAIN)) if power else float(text)


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.01, "0.01"), (4.8345e-5, "4.83·10⁻⁵"), (1e-5, "1·10⁻⁵"), (150.0, "150"), (2.5e12, "2.5·10¹²"), (0.0, "0")],
)
def test_a_damping_has_three_digits_and_no_computers_exponent(value, said):
    assert three_digits(value) == said


@given(st.floats(1e-30, 1e30))
def test_what_is_said_is_the_number_to_three_digits(value):
    assert read(three_digits(value)) == pytest.approx(value, rel=5.1e-3)


@given(st.floats(0.0, 1e20))
def test_billions_have_no_exponent_where_they_are_large(count):
    text = billions(count)
    assert read(text.replace(",", "")) == pytest.approx(count / 1e9, rel=5.1e-3, abs=1e-30)
    assert "e" not in text
