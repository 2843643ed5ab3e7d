"""Runs side by side: a ranking, their curves, what settings did, what they say to the same prompt."""

from gptpl.reports.ranking import Criterion, Failure
from gptpl.reports.writing import Written, report, write_report

__all__ = ["Criterion", "Failure", "Written", "report", "write_report"]
