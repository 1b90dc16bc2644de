"""The killable pool: hangs, crashes, order, cache, and every kind of caller."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kimi_rl.errors import InputError, RunError
from kimi_rl.rewards import VerifierPool, verify, verify_answer, verify_cases

ACT = "bad_kinds:act"


@pytest.fixture
def pool():
    with VerifierPool(deadline_s=0.5, memory_mb=1024) as pool:
        yield pool


def _alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _children() -> set[int]:
    """Children of this process, zombies included."""
    tasks = Path(f"/proc/{os.getpid()}/task")
    return {int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()}


def _wait_until(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def _pids(pool, tmp_path) -> tuple[int, int]:
    """Process ids of the executor and of its supervisor."""
    file = tmp_path / "pids"
    pool.verify("pid", str(file), kind=ACT, extract=())
    executor, supervisor = file.read_text().split()
    return int(executor), int(supervisor)


def test_bad_inputs_among_good_ones_keep_order(pool):
    answers = ["a", "hang", "b", "exit", "c", "memory", "raise", "sleep", "print", "d"]
    verdicts = pool.verify_many([(answer, answer) for answer in answers], kind=ACT, extract=())
    assert [v.status for v in verdicts] == [
        "correct",
        "timeout",
        "correct",
        "crashed",
        "correct",
        "crashed",
        "crashed",
        "timeout",
        "correct",
        "correct",
    ]
    assert [v.parsed for v in verdicts] == answers
    assert [v.value for v in verdicts] == [1.0 if v.status == "correct" else 0.0 for v in verdicts]
    assert "exit code 7" in verdicts[3].reason
    assert "memory" in verdicts[5].reason
    assert "on purpose" in verdicts[6].reason


def test_a_hang_costs_its_deadline_and_little_more(pool):
    pool.warm_up()
    start = time.monotonic()
    assert pool.verify("hang", "x", kind=ACT, extract=()).status == "timeout"
    assert 0.5 <= time.monotonic() - start < 2.5


def test_a_reply_that_came_between_two_looks_is_no_timeout():
    """On a crowded machine the executor may answer after the wait ended and sleep before it is looked at."""
    from kimi_rl.rewards.worker import Executor

    class Late:
        def line(self, timeout_s):
            return None if timeout_s > 0 else b"late"

    read_end, write_end = os.pipe()
    executor = object.__new__(Executor)
    executor.served, executor._requests, executor._replies = 0, write_end, Late()
    executor._cpu_seconds = lambda: (0.0, False)
    assert executor.ask(b"request\n", 0.01, 0.04) == b"late"
    os.close(read_end)
    os.close(write_end)


def test_order_with_two_workers():
    pairs = [(f"\\boxed{{{i}x}}", f"x*{i + i % 2}") for i in range(1, 41)]
    with VerifierPool(workers=2) as pool:
        verdicts = pool.verify_many(pairs)
    assert [v.parsed for v in verdicts] == [f"{i}x" for i in range(1, 41)]
    assert [v.status for v in verdicts] == ["wrong" if i % 2 else "correct" for i in range(1, 41)]


def test_no_process_is_left_over(tmp_path):
    before = _children()
    pool = VerifierPool(workers=2, deadline_s=0.3)
    pool.verify_many(
        [(a, str(i)) for i, a in enumerate(["hang", "exit", "sleep", "exit", "a"])], kind=ACT, extract=()
    )
    executor, supervisor = _pids(pool, tmp_path)
    assert _alive(executor) and _alive(supervisor)
    pool.close()
    assert _children() == before
    assert _wait_until(lambda: not _alive(executor) and not _alive(supervisor))
    with pytest.raises(RunError, match="closed"):
        pool.verify("\\boxed{x}", "y")


def test_children_end_when_the_parent_is_killed(tmp_path):
    file = tmp_path / "pids"
    code = (
        "from kimi_rl.rewards import VerifierPool\n"
        f"pairs = [('pid', {str(file)!r}), ('sleep', 'x')]\n"
        f"VerifierPool(deadline_s=60).verify_many(pairs, kind={ACT!r}, extract=())"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    assert _wait_until(lambda: file.exists() and len(file.read_text().split()) == 2, 60)
    executor, supervisor = map(int, file.read_text().split())
    # The supervisor may be busy waiting for its executor; killing it as well is what a group kill does.
    parent.kill()
    os.kill(supervisor, signal.SIGKILL)
    parent.wait()
    assert _wait_until(lambda: not _alive(executor) and not _alive(supervisor))


def test_a_killed_worker_is_restarted(pool, tmp_path):
    _, supervisor = _pids(pool, tmp_path)
    os.kill(supervisor, signal.SIGKILL)
    assert _wait_until(lambda: not _alive(supervisor))
    assert pool.verify("a", "a", kind=ACT, extract=()).status == "crashed"
    assert pool.verify("b", "b", kind=ACT, extract=()).status == "correct"


def test_an_interrupt_leaves_no_reply_for_the_next_call(pool, monkeypatch):
    pool.verify("a", "a", kind=ACT, extract=())
    monkeypatch.setattr(
        "kimi_rl.rewards.pool._Worker.receive", lambda worker: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        pool.verify("b", "b", kind=ACT, extract=())
    monkeypatch.undo()
    assert pool.verify("c", "x", kind=ACT, extract=()).parsed == "c"
    assert pool.verify("c", "x", kind=ACT, extract=()).status == "wrong"


def test_verdicts_are_cached_by_answer_gold_and_kind(pool, monkeypatch):
    sent = []
    send = pool_module().__dict__["_Worker"].send
    monkeypatch.setattr(
        "kimi_rl.rewards.pool._Worker.send", lambda worker, task: (sent.append(task), send(worker, task))
    )
    first = pool.verify_many([("a \\boxed{x}", "y"), ("b \\boxed{x}", "y"), ("\\boxed{x}", "x+0")])
    assert sent == [("x", "y", "math"), ("x", "x+0", "math")]
    assert pool.verify_many([("c \\boxed{x}", "y")])[0] == first[0]
    assert len(sent) == 2
    for _ in range(2):
        assert pool.verify("exit", "x", kind=ACT, extract=()).status == "crashed"
    assert len(sent) == 4  # A crash is tried again.


def pool_module():
    return sys.modules[VerifierPool.__module__]


def test_whole_numbers_need_no_child():
    pool = VerifierPool()
    assert pool.verify("\\boxed{42}", "42").status == "correct"
    assert pool.verify("#### 41", "42").status == "wrong"
    assert pool._pool == []


def _mixed(pool) -> list[str]:
    pairs = [("\\boxed{\\frac12}", "0.5"), ("\\boxed{\\frac12}", "0.6"), ("nothing", "1")]
    return [verdict.status for verdict in pool.verify_many(pairs)]


EXPECTED = ["correct", "wrong", "no_answer"]


def test_from_threads():
    results: list[list[str]] = []
    with VerifierPool() as pool:
        threads = [threading.Thread(target=lambda: results.append(_mixed(pool))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert results == [EXPECTED] * 4


def test_a_hang_is_killed_from_a_thread(pool):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(pool.verify("hang", "x", kind=ACT, extract=()).status)
    )
    thread.start()
    thread.join(30)
    assert results == ["timeout"]


def test_from_an_asyncio_loop(pool):
    async def main():
        ticks = 0
        hang = asyncio.create_task(pool.averify_many([("hang", "x")], kind=ACT, extract=()))
        while not hang.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return (await hang)[0].status, ticks, _mixed(pool)

    status, ticks, mixed = asyncio.run(main())
    assert status == "timeout" and ticks > 10
    assert mixed == EXPECTED


def test_from_a_ray_actor(ray_local):
    here, root = str(Path(__file__).parent), str(Path(__file__).parents[2])

    @ray_local.remote
    class Learner:
        def verdicts(self):
            from kimi_rl.rewards import VerifierPool

            with VerifierPool(deadline_s=0.5) as pool:
                pairs = [("\\boxed{\\frac12}", "0.5"), ("\\boxed{\\frac12}", "0.6"), ("nothing", "1")]
                statuses = [verdict.status for verdict in pool.verify_many(pairs)]
                return statuses + [pool.verify("hang", "x", kind="bad_kinds:act", extract=()).status]

    path = {"env_vars": {"PYTHONPATH": os.pathsep.join([here, root])}}
    actor = Learner.options(runtime_env=path).remote()
    try:
        assert ray_local.get(actor.verdicts.remote(), timeout=120) == [*EXPECTED, "timeout"]
    finally:
        ray_local.kill(actor)


def test_import_is_light():
    heavy = ("torch", "sympy", "math_verify", "ray")
    code = f"import sys, kimi_rl.rewards; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert run.stdout.strip() == "[]"


def test_own_functions(pool):
    verdict = pool.verify("\\boxed{7}", "8", kind="bad_kinds:half")
    assert (verdict.value, verdict.status, verdict.parsed) == (0.5, "correct", "7")
    assert pool.verify("\\boxed{7}", "8", kind="bad_kinds:nothing").value is None


@pytest.mark.parametrize("kind", ["maths", "bad_kinds:absent", "no_such_module:f", ":f", "m:"])
def test_a_wrong_kind_is_an_input_error_not_a_zero(pool, kind):
    with pytest.raises(InputError, match="reward"):
        pool.verify("\\boxed{x}", "x", kind=kind)
    assert pool.verify("\\boxed{x}", "x+0").status == "correct"


def test_bad_arguments_are_input_errors(pool):
    with pytest.raises(InputError, match="row 1: gold must be a string, found NoneType"):
        pool.verify_many([("a", "b"), ("a", None)])
    with pytest.raises(InputError, match="row 0: expected"):
        pool.verify_many([7])
    with pytest.raises(InputError, match="unknown marker 'box'"):
        pool.verify("a", "b", extract=("box",))
    with pytest.raises(InputError, match="deadline_s"):
        VerifierPool(deadline_s=0)


def test_module_functions_share_one_pool():
    assert verify("so \\boxed{\\frac12}", "0.5").status == "correct"
    assert verify_answer("1/2", "0.5").status == "correct"
    assert verify_answer("the 42", "42").status == "wrong"
    assert verify_answer("  ", "42").status == "no_answer"


def test_cases_with_completions_and_bare_answers():
    rows = [
        {"gold": "3", "answer": "3"},
        {"gold": "3", "completion": "\\boxed{3}", "id": "extra keys are fine"},
        {"gold": "3", "completion": "3"},
        {"gold": "3", "answer": "4"},
    ]
    assert [v.status for v in verify_cases(rows)] == ["correct", "correct", "no_answer", "wrong"]
    for bad in (
        {"gold": "3"},
        {"gold": 3, "answer": "3"},
        {"gold": "3", "answer": "3", "completion": "3"},
        {"answer": "3"},
    ):
        with pytest.raises(InputError, match="row 2"):
            verify_cases([rows[0], bad])
