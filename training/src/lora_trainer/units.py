"""Human-readable durations, bytes, losses and percentages."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return seconds as m:ss, h:mm:ss or days and h:mm:ss."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02}"
    return (f"{days}d " if days else "") + f"{hour}:{minute:02}:{second:02}"


def size(count: float) -> str:
    """Return bytes in the largest fitting decimal unit."""
    for unit in ("bytes", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def number(value: float) -> str:
    """Return a loss or perplexity in four decimals, a large or small one in four digits."""
    return f"{value:.4f}" if value == 0 or 0.1 <= abs(value) < 10 else f"{value:.4g}"


def percent(fraction: float) -> str:
    """Return a fraction as a percentage."""
    return f"{fraction:.1%}"
