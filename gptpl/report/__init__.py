"""Runs side by side: a ranking, their curves, what settings did, what they say to the same prompt."""

from gptpl.report.failures import Failure, find_failures
from gptpl.report.write import write_report

__all__ = ["Failure", "find_failures", "write_report"]
