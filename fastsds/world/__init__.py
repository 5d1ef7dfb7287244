"""The embedded world: a small place in which the whole method can be seen to work, offline, on two cores."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
TEACHER = WEIGHTS / "teacher"
STUDENT = WEIGHTS / "student"
VILT = WEIGHTS / "vilt"
RECIPE = Path(__file__).parents[2] / "configs" / "world.yaml"
