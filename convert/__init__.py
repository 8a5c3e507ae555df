"""Converting: one streaming pass from a checkpoint to a file that somebody else's engine runs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..quant.planning.plan import Form
    from ..runner.settings import Compute, Evaluation
    from ..sources.hub.access import HubAccess
    from .calibrate import write_imatrix
    from .pipeline import convert
    from .settings import NO_CALIBRATION, Calibration, Goal, Output

__all__ = [
    "NO_CALIBRATION",
    "Calibration",
    "Compute",
    "Evaluation",
    "Form",
    "Goal",
    "HubAccess",
    "Output",
    "convert",
    "write_imatrix",
]

_MODULES = {
    "convert": ".pipeline",
    "write_imatrix": ".calibrate",
    "Compute": "..runner.settings",
    "Evaluation": "..runner.settings",
    "Form": "..quant.planning.plan",
    "HubAccess": "..sources.hub.access",
}


def __getattr__(name: str) -> Any:
    """`moecast.convert.convert` and the settings it takes, imported only when somebody asks for them."""
    if name in __all__:
        return getattr(import_module(_MODULES.get(name, ".settings"), __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
