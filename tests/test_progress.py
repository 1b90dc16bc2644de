"""The progress view, live and plain, and the tail of metrics.jsonl."""

import io
import json
import os
import threading

from rich.console import Console

from kimi_rl.progress import ProgressView, Tail, duration, follow


def train(step: int, total: int = 10, stage: str = "rlvr", **values) -> dict:
    row = {"type": "train", "stage": stage, "step": step, "steps_total": total, "time": 100.0 + 2 * step}
    return row | values


def evaluation(**values) -> dict:
    return {"type": "eval", "stage": "rlvr", "step": 5, "steps_total": 10, "when": "during", **values}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(**options) -> tuple[ProgressView, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    return ProgressView(console=Console(file=out, width=20), clock=clock, **options), out, clock


def test_plain_lines_come_every_so_often_and_the_last_one_always():
    view, out, clock = plain(plain_every=10)
    with view:
        for step in range(1, 11):
            clock.now += 4
            view.update(train(step, reward=0.5, accuracy=0.25, tokens_per_s=1234.5, mismatch_kl=2e-4))
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "7/10", "10/10"]
    figures = "reward 0.500  accuracy 25.0%  tokens/s 1,234  mismatch KL 2.0e-04"
    assert lines[1] == f"rlvr 4/10  {figures}  ETA 12 s"


def test_evaluations_notes_and_status_are_always_printed():
    view, out, _ = plain(plain_every=1e9)
    with view:
        view.status("building [the] model")
        view.update(train(1))
        view.update({"type": "note", "stage": "rlvr", "step": 0, "text": "3 dropped"})
        sampled = {"k": 4, "avg_at_k": 0.5, "avg_at_k_se": 0.02}
        view.update(evaluation(held_out_accuracy=0.613, held_out_se=0.03, **sampled))
        view.update(evaluation())
    assert out.getvalue().splitlines() == [
        "building [the] model",
        "rlvr: 3 dropped",
        "rlvr 5/10  held-out during: 61.3% ± 3.0%  avg@4 50.0% ± 2.0%",
        "rlvr 5/10  held-out during: no figures",
    ]


def test_missing_and_null_figures_are_left_out():
    view, out, _ = plain(plain_every=0)
    view.update(train(1, reward=None, loss=0.5))
    view.update({"type": "train", "stage": "x", "step": 1})
    assert out.getvalue().splitlines() == ["rlvr 1/10  loss 0.5000", "x 1/?"]


def test_disabled_prints_nothing():
    view, out, _ = plain(enabled=False)
    with view:
        view.status("x")
        view.update(train(10))
    assert out.getvalue() == ""


def test_live_view_shows_stage_step_figures_and_eta():
    out = io.StringIO()
    view = ProgressView(console=Console(file=out, force_terminal=True, width=100, color_system=None))
    with view:
        view.status("syncing weights")
        view.update(evaluation(held_out_accuracy=0.25, held_out_se=0.05))
        for step in (1, 2, 3):
            view.update(train(step, reward=0.75, mismatch_kl=1e-5))
        view.status("evaluating")
    text = out.getvalue()
    for shown in ("rlvr", "3/10", "ETA 14 s", "0.750", "1.0e-05", "held-out", "25.0% ± 5.0%", "evaluating"):
        assert shown in text


def test_a_new_stage_starts_its_own_clock():
    view, _, _ = plain()
    for step in (1, 2):
        view.update(train(step, stage="sft"))
    assert view.eta_s() == 16
    view.update(train(1, stage="rlvr"))
    assert view.eta_s() is None


def test_duration():
    shown = [duration(s) for s in (None, 0, 59.6, 200, 3599.7, 7500)]
    assert shown == ["–", "0 s", "1 min 00 s", "3 min 20 s", "1 h 00 min", "2 h 05 min"]


# -------------------------------------------------------------------------------------------------- follow


def lines(*steps: int) -> bytes:
    return b"".join(json.dumps(train(step)).encode() + b"\n" for step in steps)


def steps(tail: Tail) -> list[int]:
    return [row["step"] for row in tail.read()]


def test_tail_waits_for_the_file_and_for_the_end_of_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert steps(tail) == []
    path.write_bytes(lines(1) + lines(2)[:9])
    assert steps(tail) == [1]
    path.write_bytes(lines(1, 2, 3))
    assert steps(tail) == [2, 3]
    assert steps(tail) == []


def test_tail_of_a_file_that_was_truncated_or_replaced(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    path.write_bytes(lines(1, 2, 3))
    assert steps(tail) == [1, 2, 3]
    path.write_bytes(lines(1, 2))  # shorter, the same file
    assert steps(tail) == []
    other = tmp_path / "new"
    other.write_bytes(lines(1, 2, 4, 5, 6))  # longer, another file
    os.replace(other, path)
    assert steps(tail) == [4, 5, 6]


def test_tail_passes_over_broken_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(1) + b'{"torn\n\xff\n[1]\n\n' + lines(2))
    assert steps(Tail(path)) == [1, 2]


def test_follow_delivers_what_was_written_before_the_stop(tmp_path):
    path, stop = tmp_path / "metrics.jsonl", threading.Event()
    view, out, _ = plain(plain_every=0)
    thread = threading.Thread(target=follow, args=(path, view, stop), kwargs={"poll_s": 0.01})
    thread.start()
    path.write_bytes(lines(1, 2, 3))
    stop.set()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/10", "2/10", "3/10"]
