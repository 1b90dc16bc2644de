"""Time KDA on the CPU: our chunkwise PyTorch form against transformers' PyTorch fallback, forward and
backward.

    python benchmarks/kda_chunk_cpu.py [--out FILE] [--repeats 5] [--heads 4] [--dim 64] [--threads 1]

Prints (and writes) JSON: the median and the best milliseconds of each form per shape, their ratio (best /
best), and the largest difference of the outputs. The two forms are timed in turns, so that other load hits
both. float32.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

# transformers calls Triton whenever fla is importable, on CPU tensors too. Without fla it takes its own
# PyTorch form.
sys.modules["fla"] = None

import torch  # noqa: E402
from result import hand_in  # noqa: E402
from transformers.models.kimi_linear import modeling_kimi_linear as hf  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kimi_rl.kernels.kda_chunk.torch_chunk import kda_chunk_torch  # noqa: E402

SHAPES = [(32, 64), (8, 128), (1, 256), (1, 1024), (4, 1024)]  # (batch, tokens)


def inputs(batch: int, tokens: int, heads: int, dim: int) -> list[torch.Tensor]:
    shape = (batch, tokens, heads, dim)
    q, k, v = (torch.randn(shape) for _ in range(3))
    g = -torch.nn.functional.softplus(torch.randn(shape))
    beta = torch.rand(shape[:3])
    return [x.requires_grad_() for x in (q, k, v, g, beta)]


def run(form, args: list[torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Milliseconds of one forward and backward, and the output."""
    start = time.perf_counter()
    o = form(*args)
    torch.autograd.grad(o.sum(), args)
    return (time.perf_counter() - start) * 1000, o.detach()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    forms = {
        "ours": lambda *a: kda_chunk_torch(*a)[0],
        "transformers": lambda q, k, v, g, beta: hf.chunk_kimi_delta_attention(
            q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True
        )[0],
    }
    rows = []
    for batch, tokens in SHAPES:
        args = inputs(batch, tokens, options.heads, options.dim)
        outputs = {name: run(form, args)[1] for name, form in forms.items()}  # also warms up
        times = {name: [] for name in forms}
        for _ in range(options.repeats):
            for name, form in forms.items():
                times[name].append(run(form, args)[0])
        rows.append(
            {
                "batch": batch,
                "tokens": tokens,
                "median_ms": {name: round(statistics.median(t), 2) for name, t in times.items()},
                "best_ms": {name: round(min(t), 2) for name, t in times.items()},
                "speedup": round(min(times["transformers"]) / min(times["ours"]), 2),
                "max_difference": float((outputs["ours"] - outputs["transformers"]).abs().max()),
            }
        )
    import transformers

    report = {
        "benchmark": "kda_chunk_cpu",
        "heads": options.heads,
        "head_dim": options.dim,
        "threads": options.threads,
        "repeats": options.repeats,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "rows": rows,
    }
    hand_in(report, options.out)


if __name__ == "__main__":
    main()
