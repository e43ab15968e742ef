"""WHAT TO DO: DATA and a machine become a plan, every decision with its reason."""

from autoseg.plan.draft import parse_settings
from autoseg.plan.evidence import Evidence, read_evidence
from autoseg.plan.fingerprint import fingerprint
from autoseg.plan.hardware import gpus_of_run, probe_hardware, runs_on_one, share_hardware
from autoseg.plan.planner import make_plan
from autoseg.plan.resolution import resolution_groups
from autoseg.plan.rules_machine import cost_of
from autoseg.plan.shipped import own_or_shipped, read_hardware
from autoseg.plan.shrink import shrink

__all__ = [
    "Evidence",
    "cost_of",
    "fingerprint",
    "gpus_of_run",
    "make_plan",
    "own_or_shipped",
    "parse_settings",
    "probe_hardware",
    "read_evidence",
    "read_hardware",
    "resolution_groups",
    "runs_on_one",
    "share_hardware",
    "shrink",
]
