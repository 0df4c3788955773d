"""Is the copy the original? Checks and bounds, stored external values, mutations."""

from workflow.proof.bounds import BOUNDS, Check, as_json, failed_checks
from workflow.proof.checks import copy_reference, reference_loss, verify

__all__ = [
    "BOUNDS",
    "Check",
    "as_json",
    "copy_reference",
    "failed_checks",
    "reference_loss",
    "verify",
]
