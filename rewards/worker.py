"""A verifier worker: `python -m kimi_rl.rewards.worker MEMORY_MB`, started by `pool.py`.

Two processes. The supervisor imports the heavy modules once, has one thread, and computes no verdict; it
forks the executor, which computes under a memory limit and nothing else. When a verdict passes its deadline
the supervisor kills the executor and forks another: milliseconds, where a fresh start would import sympy
again. The supervisor is started by `exec` and forks while it has one thread, so the parent may have any
number of threads, and no signal handler is involved.

Protocol: one JSON object a line. The supervisor first writes {"ready": true}; then for each request
{"kind", "answer", "gold", "deadline_s", "longest_s"} one reply {"value", "status", "reason"}, before which
{"loading": true} and {"loading": false} may stand around an import that takes long.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time

from kimi_rl.errors import InputError
from kimi_rl.rewards import reasoning_gym
from kimi_rl.rewards.kinds import load_function
from kimi_rl.rewards.verdict import Verdict

# sympy's caches grow with every new expression; a fresh fork drops them.
_REQUESTS_PER_EXECUTOR = 2_000
_PR_SET_PDEATHSIG = 1
_POLL_S = 5.0


class LineReader:
    """Lines from a raw file descriptor, with a deadline."""

    def __init__(self, fd: int):
        self.fd, self._buffer = fd, bytearray()

    def line(self, timeout_s: float) -> bytes | None:
        """The next line; b"" at the end of the stream; None when `timeout_s` passes first."""
        end = time.monotonic() + timeout_s
        while (cut := self._buffer.find(b"\n")) < 0:
            if not select.select([self.fd], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            chunk = os.read(self.fd, 1 << 16)
            if not chunk:
                return b""
            self._buffer += chunk
        line = bytes(self._buffer[: cut + 1])
        del self._buffer[: cut + 1]
        return line


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`; os.write may take part of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def run_one(kind: str, answer: str, gold: str) -> dict:
    """Compute one verdict in this process. Every exception becomes a status, a bad import path an
    `input_error`.
    """
    try:
        if kind == "math":
            from kimi_rl.rewards.math_equal import math_equal

            status, reason = math_equal(answer, gold)
            verdict = Verdict.of(status, None, reason)
        else:
            verdict = _own_verdict(load_function(kind)(answer, gold))
    except InputError as error:
        return {"input_error": str(error)}
    except MemoryError:
        verdict = Verdict.of("crashed", None, "the comparison ran out of the verifier's memory limit")
    except Exception as error:  # noqa: BLE001 - whatever a comparison raises must become a verdict
        verdict = Verdict.of("crashed", None, f"{type(error).__name__}: {str(error)[:200]}".splitlines()[0])
    return {"value": verdict.value, "status": verdict.status, "reason": verdict.reason}


def _own_verdict(result: object) -> Verdict:
    if isinstance(result, Verdict):
        return result
    if result is None:
        return Verdict.of("unparseable_gold", None, "the reward function returned None")
    value = float(result)  # type: ignore[arg-type]
    return Verdict(
        value, "correct" if value > 0 else "wrong", None, f"the reward function returned {value:g}"
    )


def _execute(requests: int, replies: int, memory_mb: int) -> None:
    """The executor: answer requests until the supervisor closes the pipe."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    import resource

    limit = memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reader = LineReader(requests)
    while line := reader.line(float(2**20)):
        request = json.loads(line)
        reply = run_one(request["kind"], request["answer"], request["gold"])
        write_all(replies, json.dumps(reply).encode() + b"\n")


class Executor:
    """The forked process that computes."""

    def __init__(self, memory_mb: int):
        request_read, self._requests = os.pipe()
        replies, reply_write = os.pipe()
        self.served = 0
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._requests)
                os.close(replies)
                _execute(request_read, reply_write, memory_mb)
            finally:
                os._exit(0)
        os.close(request_read)
        os.close(reply_write)
        self._replies = LineReader(replies)

    def ask(self, line: bytes, deadline_s: float, longest_s: float) -> bytes | None:
        """The reply line; b"" if the executor died; None if the deadline passed. Kill it in both cases.

        On a crowded machine wall-clock time says little about the answer: an executor that goes on computing
        but has not yet had the deadline as CPU time is waited for, up to `longest_s`.
        """
        self.served += 1
        cpu_before = self._cpu_seconds()[0]
        try:
            write_all(self._requests, line)
        except BrokenPipeError:
            return b""
        end = time.monotonic() + longest_s
        reply, had = self._replies.line(deadline_s), cpu_before
        while reply is None and time.monotonic() < end:
            cpu, running = self._cpu_seconds()
            used = cpu - cpu_before
            if used > 0.9 * deadline_s or not (running or cpu > had):
                # It sleeps because it hangs, or because its reply came after the wait and before this look at it.
                return self._replies.line(0.0)
            reply, had = self._replies.line(max(0.05, deadline_s - used)), cpu
        return reply

    def _cpu_seconds(self) -> tuple[float, bool]:
        """CPU time used so far, and whether the executor computes right now. (0.0, False) where there is no
        /proc.
        """
        try:
            with open(f"/proc/{self.pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            return 0.0, False
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), fields[0] in "RD"

    def kill(self) -> int:
        """Kill and reap; returns the wait status."""
        os.kill(self.pid, signal.SIGKILL)
        status = os.waitpid(self.pid, 0)[1]
        os.close(self._requests)
        os.close(self._replies.fd)
        return status


def main() -> None:
    memory_mb = int(sys.argv[1])
    # Ctrl-C reaches the whole terminal group; the parent decides when workers end, by closing their input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever a user's function prints must not end up in the protocol.
    out = os.dup(1)
    os.dup2(2, 1)
    # Once, before any fork: the imports, and the tables that the LaTeX parser builds at its first
    # expressions.
    for warm_up in ("\\frac{x^{2}}{2}+1", "(\\sqrt{2}, -\\pi)", "f(x)=\\sin(2x)", "x(x+1)"):
        run_one("math", warm_up, warm_up + " ")

    parent = os.getppid()
    reader = LineReader(0)
    executor: Executor | None = None
    write_all(out, b'{"ready": true}\n')
    while True:
        line = reader.line(_POLL_S)
        if line is None:
            # The input stays open if some other child of a killed parent inherited it; then only this tells.
            if os.getppid() != parent:
                break
            continue
        if line == b"":
            break
        if executor is not None and executor.served >= _REQUESTS_PER_EXECUTOR:
            executor.kill()
            executor = None
        request = json.loads(line)
        if request["kind"] == reasoning_gym.KIND and not reasoning_gym.is_loaded(request["gold"]):
            write_all(out, b'{"loading": true}\n')
            reasoning_gym.preload(request["gold"])
            write_all(out, b'{"loading": false}\n')
            if executor is not None:
                executor.kill()
                executor = None
        executor = executor or Executor(memory_mb)
        deadline_s = float(request["deadline_s"])
        reply = executor.ask(line, deadline_s, float(request["longest_s"]))
        if not reply:
            died = executor.kill()
            executor = None
            verdict = (
                Verdict.of("timeout", None, f"no verdict within {deadline_s:g} s")
                if reply is None
                else Verdict.of("crashed", None, f"the verifier process died ({_death(died)})")
            )
            out_reply = {"value": verdict.value, "status": verdict.status, "reason": verdict.reason}
            reply = json.dumps(out_reply).encode() + b"\n"
        write_all(out, reply)
    if executor is not None:
        executor.kill()


def _death(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return f"exit code {os.WEXITSTATUS(status)}"


if __name__ == "__main__":
    main()
