"""Runs any parts of a model that is larger than memory, at the speed of the disk. See README.md."""

from ._caches import SpilledCaches
from ._memory import available, format_bytes, parse_bytes, peak_resident_set
from ._plan import BudgetError, Plan
from ._run import PartialRun, Stats, plan

__version__ = "0.1.0"
__all__ = [
    "BudgetError",
    "PartialRun",
    "Plan",
    "SpilledCaches",
    "Stats",
    "available",
    "format_bytes",
    "parse_bytes",
    "peak_resident_set",
    "plan",
]
