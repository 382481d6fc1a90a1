"""Numbers as people read them: means, shares and sizes, "-" where there is none."""


def number_text(value: float | None, digits: int = 3) -> str:
    """1234.5678 -> "1,234.568"; what a stranger made too large for a line as 1e+20."""
    return "-" if value is None else f"{value:,.{digits}f}" if abs(value) < 1e15 else f"{value:.3g}"


def percent_text(value: float | None) -> str:
    """0.1234 -> "12.3%"."""
    return "-" if value is None else f"{value:.1%}" if abs(value) < 1e6 else f"{100 * value:.3g}%"


def bytes_text(count: float) -> str:
    """12345 -> "12.3 kB"; thousands, not 1024s."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
