"""Comparing arms: the same recipe with one thing changed, over seeds.

plan -> fairness -> runner -> curves -> statistics -> analysis -> panels -> page
"""

from kimi_rl.compare.comparison import compare, text_summary
from kimi_rl.compare.plan import Comparison, Plan, load_plan

__all__ = ["Comparison", "Plan", "compare", "load_plan", "text_summary"]
