"""The page that a run is read on: figures and tables in one file."""

from sedd.report.page import summary, write_report
from sedd.report.plots import ReportData

__all__ = ["ReportData", "summary", "write_report"]
