"""A number that nobody measured here: its value, how wrong it may be, and where it comes from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A value that lies within [low, high]."""

    value: float
    low: float
    high: float
    provenance: str
    """what the range rests on"""

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"expected low <= value <= high, got {self}")

    def times(self, factor: float) -> "Estimate":
        """The estimate in another unit; factor is exact and positive."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor, self.provenance)

    def as_json(self) -> dict[str, object]:
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "provenance": self.provenance,
        }
