"""The report of a check: terminal table, pictures and one HTML page."""

from sa_export.report.html import write_report
from sa_export.report.render import render
from sa_export.report.table import text_table

__all__ = ["render", "text_table", "write_report"]
