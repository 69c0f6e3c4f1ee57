"""The report: one self-contained HTML page about the runs of an output folder.

The page contains all its images, has no script, and loads nothing from the network. It shows what a run has so far and
states what is missing. Equal files give equal bytes. All figures come from existing files: the report trains and
evaluates nothing.
"""

from datm_ray.report.card import CARD, is_card, published_files
from datm_ray.report.page import write_report
from datm_ray.report.results import RunSummary, accuracy_table, facts_of, fair_table, networks_table, write_summary

__all__ = [
    "CARD",
    "RunSummary",
    "accuracy_table",
    "facts_of",
    "fair_table",
    "is_card",
    "networks_table",
    "published_files",
    "write_report",
    "write_summary",
]
