"""WHAT TO DO: DATA and a machine become a plan, every decision with its reason."""

from autoseg.plan.draft import parse_settings
from autoseg.plan.fingerprint import fingerprint
from autoseg.plan.hardware import probe_hardware
from autoseg.plan.planner import make_plan

__all__ = ["fingerprint", "make_plan", "parse_settings", "probe_hardware"]
