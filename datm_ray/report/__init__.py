"""The report: one self-contained HTML page about the runs of an output folder.

Every image is inside the page, there is no script, and nothing is requested from anywhere. It shows whatever a run
has so far and says what is missing. The same files give the same bytes. Nothing is computed here that is not in the
files already: no training, no evaluation.
"""

from datm_ray.report.page import write_report
from datm_ray.report.runs import RunSummary, accuracy_table, fair_table, networks_table, write_summary

__all__ = ["RunSummary", "accuracy_table", "fair_table", "networks_table", "write_report", "write_summary"]
