"""The report of a run: one self-contained page, and a few lines for a terminal."""

from kimi_rl.report.report import render_text_summary, write_report

__all__ = ["render_text_summary", "write_report"]
