"""Numbers in sentences and titles: at most three digits, powers of ten with raised exponents."""

from __future__ import annotations

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def superscript(exponent: int) -> str:
    """A power's exponent in raised digits."""
    return str(exponent).translate(_SUPERSCRIPTS)


def three_digits(value: float) -> str:
    """A setting, such as a damping, as everything names it: 0.01, 4.83·10⁻⁵, without zeros at the end."""
    mantissa, power, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}·10{superscript(int(exponent))}" if power else mantissa
