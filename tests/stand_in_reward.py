"""A reward function of the user's own, by import path: what tests use where a random model must get varied rewards."""


def parity(answer: str, gold: str) -> float:
    """1 for completions whose bytes add up to an odd number."""
    return float(sum(answer.encode()) % 2)
