"""How a plan is made: look at the data once, then find what fits the budget."""

from effseg.planner.check import check_plan, retrace_plan
from effseg.planner.facts import fingerprint
from effseg.planner.planning import plan
from effseg.planner.step import trace_plan
from effseg.planner.tuning import Tuning, tune

__all__ = ["Tuning", "check_plan", "fingerprint", "plan", "retrace_plan", "trace_plan", "tune"]
