"""The page that a run is read on: figures and tables in one file."""

from sedd.report.page import ReportData, summary, write_report

__all__ = ["ReportData", "summary", "write_report"]
