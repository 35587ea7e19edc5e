"""The loop over blocks, its estimate beforehand, and its memory of where it was."""

from awq.pipeline.discover import structure_of
from awq.pipeline.publish import publish
from awq.pipeline.report import BlockReport, Plan, Progress, Report, Silent, Verdict
from awq.pipeline.run import quantize

__all__ = [
    "BlockReport",
    "Plan",
    "Progress",
    "Report",
    "Silent",
    "Verdict",
    "publish",
    "quantize",
    "structure_of",
]
