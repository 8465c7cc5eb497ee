"""Proof on the user's own model and machine that speculation changes no output; see ``check_model``."""

from specdec.check.prompts import BUILTIN_PROMPTS, read_prompts
from specdec.check.report import CheckReport, Comparison, Control, Difference, TwoSample
from specdec.check.run import CheckOptions, check_drafters, check_model

__all__ = [
    "BUILTIN_PROMPTS",
    "CheckOptions",
    "CheckReport",
    "Comparison",
    "Control",
    "Difference",
    "TwoSample",
    "check_drafters",
    "check_model",
    "read_prompts",
]
