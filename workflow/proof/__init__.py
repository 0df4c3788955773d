"""Does the copy equal the original? Checks and bounds, stored external values, mutations."""

from workflow.proof.bounds import BOUNDS, Check, check_table, checks_to_json, failed_checks
from workflow.proof.checks import copy_reference, reference_loss, verify

__all__ = ["BOUNDS", "Check", "check_table", "checks_to_json", "copy_reference", "failed_checks"]
__all__ += ["reference_loss", "verify"]
