"""Runs any parts of a model that is larger than memory, at the speed of the disk. See README.md."""

from ._blocks import layout_from_module
from ._budget import plan
from ._caches import SpilledCaches
from ._memory import available, format_bytes, parse_bytes, peak_resident_set
from ._offload import Offload, offload
from ._plan import BudgetError, Plan
from ._run import PartialRun, Stats

__version__ = "0.1.0"
__all__ = [
    "BudgetError",
    "Offload",
    "PartialRun",
    "Plan",
    "SpilledCaches",
    "Stats",
    "available",
    "format_bytes",
    "layout_from_module",
    "offload",
    "parse_bytes",
    "peak_resident_set",
    "plan",
]
