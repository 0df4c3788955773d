"""Does a model equal the original? Checks and bounds, stored external values, mutations."""

from workflow.proof.bounds import BOUNDS, Check, check_table, checks_to_json, failed_checks
from workflow.proof.candidate import write_inputs
from workflow.proof.checks import copy_reference, reference_loss, verify
from workflow.proof.diagnosis import Verdict, judge
