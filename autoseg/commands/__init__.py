"""What each command of the door does: turn options into a call, and its result into text or JSON."""

from autoseg.commands.comparing import run_compare
from autoseg.commands.planning import run_fingerprint, run_import, run_plan, run_profile
from autoseg.commands.running import run_demo, run_evaluate, run_predict, run_report, run_train

__all__ = [
    "run_compare",
    "run_demo",
    "run_evaluate",
    "run_fingerprint",
    "run_import",
    "run_plan",
    "run_predict",
    "run_profile",
    "run_report",
    "run_train",
]
