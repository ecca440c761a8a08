"""Curves of a run: the values of its tags by step, with steps that a restart repeats replaced."""

from __future__ import annotations

from array import array
from bisect import bisect_left


class Curve:
    """Values of one tag."""

    def __init__(self) -> None:
        """Create an empty curve."""
        self.steps, self.seconds, self.values = array("q"), array("d"), array("d")

    def add(self, step: int, seconds: float, value: float) -> None:
        """Add a value of a step, written ``seconds`` after 1970; a value of the same or a later step is replaced."""
        if self.steps and step <= self.steps[-1]:
            self.drop(step)
        self.steps.append(step)
        self.seconds.append(seconds)
        self.values.append(value)

    def drop(self, step: int) -> None:
        """Remove the values of ``step`` and later."""
        position = bisect_left(self.steps, step)
        for part in (self.steps, self.seconds, self.values):
            del part[position:]


class Curves:
    """Curves by key, such as a tag."""

    def __init__(self) -> None:
        """Create no curves."""
        self.by_key: dict[str, Curve] = {}

    def add(self, key: str, step: int, seconds: float, value: float) -> None:
        """Add a value to a curve."""
        curve = self.by_key.get(key)
        if curve is None:
            curve = self.by_key[key] = Curve()
        curve.add(step, seconds, value)

    def drop(self, step: int) -> None:
        """Remove the values of ``step`` and later from every curve."""
        for curve in self.by_key.values():
            curve.drop(step)

    def last(self, key: str) -> float | None:
        """Return the last value of a curve; None if it has none."""
        curve = self.by_key.get(key)
        return curve.values[-1] if curve and curve.values else None

    @property
    def last_step(self) -> int:
        """Return the last step of any curve, 0 if there is none."""
        return max((curve.steps[-1] for curve in self.by_key.values() if curve.steps), default=0)
