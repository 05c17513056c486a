"""Large numbers in messages."""


def short_count(number: int) -> str:
    """Return a number with a unit that leaves at least one digit of it: 812, 47.3k, 1.4M, 1.3B."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size * 0.99995:  # what rounds to 1.0 of this unit
            return f"{number / size:.1f}{unit}"
    return str(number)
