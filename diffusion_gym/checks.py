"""Checks of numeric arguments: NumPy's numbers are taken like Python's, booleans and NaN are refused."""

import math
from numbers import Integral, Real


def checked_integer(name: str, value: object, *, at_least: int | None = None) -> int:
    """Return an integer argument, Python's or NumPy's, as an int.

    Raises:
        ValueError: it is no integer (a boolean or a float with an integer value is none), or below `at_least`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or (at_least is not None and value < at_least):
        allowed = "an integer" if at_least is None else f"an integer of at least {at_least}"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return int(value)


def checked_number(name: str, value: object, within: str = "(-inf, inf)") -> float:
    """Return a number argument, Python's or NumPy's, as a float.

    Args:
        name: The argument.
        value: Its value.
        within: The interval that it has to be in, such as "(0, 1]" or "[0, inf)".

    Raises:
        ValueError: it is no number (a boolean is none), NaN, infinite, or outside the interval.
    """
    low, high = (float(end) for end in within[1:-1].split(","))
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    number = float(value) if is_number else math.nan  # type: ignore[arg-type]
    inside = low <= number <= high and not (
        (number == low and within[0] == "(") or (number == high and within[-1] == ")")
    )
    if not inside or math.isinf(number):
        raise ValueError(f"{name} must be a finite number in {within}, got {value!r}")
    return number
