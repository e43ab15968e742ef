"""WHAT TO DO: DATA and a machine become a plan, every decision with its reason."""

from autoseg.plan.draft import parse_settings
from autoseg.plan.evidence import read_evidence
from autoseg.plan.fingerprint import fingerprint
from autoseg.plan.hardware import probe_hardware
from autoseg.plan.planner import make_plan
from autoseg.plan.resolution import resolution_groups
from autoseg.plan.shipped import hardware_file, own_or_shipped
from autoseg.plan.shrink import shrink

__all__ = [
    "fingerprint",
    "hardware_file",
    "make_plan",
    "own_or_shipped",
    "parse_settings",
    "probe_hardware",
    "read_evidence",
    "resolution_groups",
    "shrink",
]
