"""Numbers as people read them, in tables, pictures, messages and the terminal alike."""

from __future__ import annotations

import math

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def show_number(value: float, digits: int = 3) -> str:
    """Three significant digits, or another number, without an exponent where that stays short."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "∞" if value > 0 else "−∞"
    if 1e-3 <= abs(value) < 1e5:
        text = f"{value:,.0f}" if abs(value) >= 10**digits - 0.5 else f"{value:#.{digits}g}".rstrip(".")
        return text.replace("-", "−")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}·10{superscript(int(exponent))}".replace("-", "−")


def superscript(exponent: int) -> str:
    """A power's exponent in raised digits."""
    return str(exponent).translate(_SUPERSCRIPTS)


def human(size: float) -> str:
    """A number of bytes with a binary unit, three significant digits."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def three_digits(value: float) -> str:
    """A setting, such as a damping, as everything names it: 0.01, 4.83·10⁻⁵, without zeros at the end."""
    mantissa, power, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}·10{superscript(int(exponent))}" if power else mantissa
