"""`kimi-rl bench decode --op`: a KDA layer's work on one token, from its projections to `o_proj`, kernel by kernel.

Forms, all in one run, beside the floor (every state read and written once, at the copy rate measured in the same run):
`parts`, the kernels one after another as the model runs them; `fused`, `kernels/kda_step`. On a card also `recurrence`,
fla's `fused_recurrent_kda` alone, and `vllm`, its own alone where it is installed; each form is then timed as a CUDA
graph over at least four sets of inputs, as a model's layers share one; together they are larger than the cache.
On a CPU `fused` is its plain form.

Rungs between the floor and `fused`, timed in the same way, so that differences say where the time goes:
`empty`: one element scaled: a launch, with its share of the graph's;
`moved_in_place`: the states scaled in place by PyTorch. Less the floor: launch, start and end of a kernel;
`pieces`: the same in the grid and pieces of `fused` (on a card). Less `moved_in_place`: what that grid costs;
`all_bytes`: that and the conv states, inputs and outputs moved too (on a card). Less `pieces`: bytes that the floor
leaves out. `fused` less `all_bytes`: the arithmetic, its chain of loads, and the registers both take.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from kimi_rl.bench.decode import copy_bandwidth
from kimi_rl.kernels.kda_decode import kda_decode
from kimi_rl.kernels.kda_gate import kda_gate
from kimi_rl.kernels.kda_step import kda_step, kda_step_reference
from kimi_rl.kernels.short_conv import short_conv
from kimi_rl.run_dir import describe_environment

WIDTH = 4  # taps of the short convolution
EPS = 1e-5


class LayerInputs:
    """One set of inputs, states and weights of a layer, random."""

    def __init__(self, batch: int, heads: int, dim: int, device: str, dtype: torch.dtype, seed: int):
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        width = heads * dim
        self.qkv = draw(batch, 3 * width)
        self.raw_g, self.raw_beta, self.out_gate = draw(batch, width), draw(batch, heads), draw(batch, width)
        self.conv_state = draw(batch, 3 * width, WIDTH - 1)
        self.state = draw(batch, heads, dim, dim, dtype=torch.float32)  # value-major
        self.weights = {
            "conv_weight": draw(3 * width, WIDTH, dtype=torch.float32),
            "A_log": draw(heads, dtype=torch.float32),
            "dt_bias": draw(width, dtype=torch.float32),
            "norm_weight": draw(dim),
        }
        self.heads, self.width = heads, width

    def step(self, form: Callable[..., torch.Tensor] = kda_step) -> torch.Tensor:
        q, k, v = self.qkv.split(self.width, dim=-1)
        return form(
            q, k, v, self.raw_g, self.raw_beta, self.out_gate, self.conv_state, self.state, **self.weights, eps=EPS
        )  # fmt: skip

    def parts(self) -> torch.Tensor:
        """The same through the kernels that the model runs one after another; the states stay as they are."""
        mixed, _ = short_conv(
            self.qkv.unsqueeze(1), self.weights["conv_weight"], initial_state=self.conv_state, output_final_state=True
        )
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in mixed.squeeze(1).split(self.width, dim=-1))
        g = kda_gate(self.raw_g, self.weights["A_log"], self.weights["dt_bias"])
        o, _ = kda_decode(q, k, v, g, self.raw_beta.float().sigmoid(), self.state.transpose(-1, -2))
        o = torch.nn.functional.rms_norm(o.float(), (o.shape[-1],), self.weights["norm_weight"].float(), EPS)
        return (o * self.out_gate.unflatten(-1, (self.heads, -1)).float().sigmoid()).flatten(1).to(self.qkv.dtype)

    def empty(self) -> None:
        self.raw_beta[:1, :1].mul_(1.0)

    def moved_in_place(self) -> None:
        self.state.mul_(1.0)

    def pieces(self, rest: bool = False, factor: float = 1.0) -> torch.Tensor:
        """States, and with `rest` all else, moved as `fused` moves them, times `factor`."""
        from kimi_rl.bench.step_bytes import move_step_bytes

        tensors = self.qkv, self.raw_g, self.raw_beta, self.out_gate, self.conv_state, self.state
        return move_step_bytes(*tensors, rest=rest, factor=factor)

    def all_bytes(self, factor: float = 1.0) -> torch.Tensor:
        return self.pieces(rest=True, factor=factor)

    def recurrence(self) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in self.qkv.split(self.width, dim=-1))
        g = self.raw_g.float().unflatten(-1, (self.heads, -1)).clamp(max=0)
        return kda_decode(q, k, v, g, self.raw_beta.float().sigmoid(), self.state)[0]

    def vllm(self) -> torch.Tensor:
        """The recurrence as vLLM's layer calls it: batch along one packed row, states in place by slot."""
        from vllm.third_party.flash_linear_attention.ops.kda import fused_recurrent_kda

        q, k, v = (x.unflatten(-1, (self.heads, -1)).unsqueeze(0) for x in self.qkv.split(self.width, dim=-1))
        g = self.raw_g.float().unflatten(-1, (self.heads, -1)).clamp(max=0).unsqueeze(0)
        batch = self.qkv.shape[0]
        return fused_recurrent_kda(
            q=q, k=k, v=v, g=g, beta=self.raw_beta.float().sigmoid().unsqueeze(0), initial_state=self.state,
            cu_seqlens=torch.arange(batch + 1, device=q.device, dtype=torch.int32),
            ssm_state_indices=torch.arange(batch, device=q.device, dtype=torch.int32),
        )[0]  # fmt: skip


def bench_decode_op(
    batches: Sequence[int],
    *,
    heads: int = 8,
    dim: int = 128,
    repeats: int = 20,
    device: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Time of each form per batch size; the keys of a row say their units."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    bandwidth = copy_bandwidth(device)
    rows = []
    with torch.no_grad():
        for batch in batches:
            moved = 2 * 4 * batch * heads * dim * dim
            count = max(4, min(16, 2**30 // moved)) if device == "cuda" else 2
            sets = [LayerInputs(batch, heads, dim, device, dtype, seed + n) for n in range(count)]
            row = {"batch": batch, "state_bytes": moved // 2, "floor_s": moved / bandwidth}
            row["error_ratio"] = _error_ratio(LayerInputs(batch, heads, dim, device, dtype, seed))
            for name in ("empty", "moved_in_place", "parts", "fused", *_on_a_card(device)):
                run = LayerInputs.step if name == "fused" else getattr(LayerInputs, name)
                total = _seconds(lambda run=run, sets=sets: [run(one) for one in sets], repeats, device)
                row[f"{name}_s"] = total / count
                row[f"{name}_over_floor"] = row[f"{name}_s"] / row["floor_s"]
            rows.append(row)
    return {
        "heads": heads,
        "dim": dim,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "copy_bytes_per_s": bandwidth,
        "rows": rows,
        "environment": describe_environment(),
    }


def _on_a_card(device: str) -> list[str]:
    if device != "cuda":
        return []
    return ["pieces", "all_bytes", "recurrence", *(["vllm"] if _has_vllm_kernels() else [])]


def _has_vllm_kernels() -> bool:
    """Whether a vLLM is installed that keeps fla's kernels where 0.26 does."""
    if importlib.util.find_spec("vllm") is None:
        return False
    return importlib.util.find_spec("vllm.third_party.flash_linear_attention") is not None


def _error_ratio(inputs: LayerInputs) -> float:
    """RMS of the difference between the form that runs here and the plain one, over the RMS of the plain one."""
    states = inputs.conv_state.clone(), inputs.state.clone()
    found = inputs.step().float()
    inputs.conv_state, inputs.state = states
    plain = inputs.step(kda_step_reference).float()
    return ((found - plain).square().mean().sqrt() / plain.square().mean().sqrt()).item()


def _seconds(run: Callable[[], Any], repeats: int, device: str) -> float:
    """Median seconds of a call: of a graph replay on a card, of the call itself elsewhere."""
    run()  # compiles and fills caches
    if device != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return median(times)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)
