"""Figures as the cells of tables."""

from collections.abc import Mapping


def share_cell(share: Mapping | None, interval: bool = False) -> str:
    if share is None:
        return ""
    return f"{share['value']:.3f}" + (f" {interval_cell(share['interval'])}" if interval else "")


def number_cell(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def interval_cell(interval: tuple[float, float], digits: int = 3) -> str:
    return f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
