"""An `AttentionReport` for people: a table in the terminal, an HTML page, and all that is known about one layer."""

from fla_swap.reporting.explanation import explain
from fla_swap.reporting.page import report_html
from fla_swap.reporting.table import report_table, report_text

__all__ = ["explain", "report_html", "report_table", "report_text"]
