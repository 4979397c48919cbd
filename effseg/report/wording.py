"""Numbers as people read them."""

import math

MINUS, TIMES, DASH = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"

_FORMATS = {"share": ".3f", "mm": ".2f", "ml": ",.2f", "count": ",.0f", "percent": "+.1%"}


def write_number(value: float) -> str:
    """Four significant digits, all of a larger whole part; no exponent from 1e-4 to 1e7."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3g}".replace("-", MINUS)
    places = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{places}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", MINUS)


def write_score(value: float | None, kind: str) -> str:
    """A score as written in tables; a dash where it is undefined.

    Args:
        value: in its own unit; a fraction for percent.
        kind: share, mm, ml, count or percent.
    """
    return DASH if value is None else f"{value:{_FORMATS[kind]}}".replace("-", MINUS)


def write_p(value: float | None) -> str:
    """A p value; a dash where the test is undefined."""
    if value is None:
        return DASH
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def write_share(value: float | None) -> str:
    """A score between 0 and 1."""
    return write_score(value, "share")


def spell(key: str) -> str:
    """A field's name in words: `network.growth_rate` is `network growth rate`."""
    return key.replace(".", " ").replace("_", " ")
