"""Reward functions that misbehave, for test_pool.py: called in a verifier child as function(answer, gold)."""

import os
import time


def act(answer: str, gold: str) -> bool:
    """Do what the answer says; else compare it with the gold answer."""
    if answer == "hang":
        while True:
            pass
    if answer == "sleep":
        time.sleep(3600)
    if answer == "exit":
        os._exit(7)
    if answer == "memory":
        return bool("x" * 2**34)
    if answer == "raise":
        raise RuntimeError("on purpose")
    if answer == "print":
        print("noise on standard output")
    if answer == "pid":
        with open(gold, "a") as file:
            file.write(f"{os.getpid()} {os.getppid()}\n")
    return answer == gold


def half(answer: str, gold: str) -> float:
    return 0.5


def nothing(answer: str, gold: str) -> None:
    return None
