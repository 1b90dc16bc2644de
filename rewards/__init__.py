"""Verifiable rewards: pure comparison functions and the killable pool that runs them. Imports nothing
heavy.
"""

from kimi_rl.rewards.extract import final_answer
from kimi_rl.rewards.kinds import check_kind
from kimi_rl.rewards.pool import VerifierPool, verify, verify_answer, verify_cases
from kimi_rl.rewards.verdict import STATUSES, Verdict

__all__ = [
    "STATUSES",
    "Verdict",
    "VerifierPool",
    "check_kind",
    "final_answer",
    "verify",
    "verify_answer",
    "verify_cases",
]
