"""How long the stages of a run take."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Timer:
    """Seconds by the name of a stage. Every moment belongs to the stage whose lap ends next, so that the stages add up to the whole time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.clock = time.perf_counter()

    def lap(self, name: str) -> None:
        """Adds the time since the last lap to a stage."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.clock
        self.clock = now

    def include(self, stages: Mapping[str, float]) -> None:
        """Takes over stages that another timer measured since the last lap."""
        for name, seconds in stages.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            self.clock += seconds

    @property
    def total(self) -> float:
        """The sum of all stages."""
        return sum(self.seconds.values())
