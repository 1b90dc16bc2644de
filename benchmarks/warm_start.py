"""What compiled kernels that are kept save: the learner's first forward and backward with an empty folder, and again.

    python benchmarks/warm_start.py --out benchmarks/results/warm_start_h100.json

Each start is a process of its own. It builds the model and trainer, runs the warm-up that a training begins with (see
`kimi_rl/learner/warm_up.py`), and then an optimizer step's forward and backward twice: the first shows what the warm-up
left to compile. Needs an NVIDIA card. `--folder` keeps the cache; by default it lies in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from result import hand_in

from kimi_rl.kernels.compile_cache import cache_environment, tuned_environment


def start(size: str, packing: str) -> dict[str, float]:
    """Seconds of the parts of one start, in this process."""
    begin = time.perf_counter()
    import torch

    from kimi_rl.bench.learner import BenchTrainer, _trainer, make_batch
    from kimi_rl.learner.packed import PackingSettings
    from kimi_rl.learner.warm_up import warm_up
    from kimi_rl.model.modeling import KimiLinearForCausalLM
    from kimi_rl.model.presets import bare_config
    from kimi_rl.recipe import ModelSection

    imported = time.perf_counter()
    section = ModelSection(size=size)
    config = bare_config(section, 32768)
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(config).to("cuda").train()
    batch = make_batch(groups=1, group_size=16, prompt_tokens=100, mean=300, longest=2048, vocabulary=32768, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(BenchTrainer, model, folder, 1, 16, 16, "cuda")
        trainer.packing = PackingSettings(packing, 16384)
        part = {name: x.to("cuda") for name, x in batch.items()}
        torch.cuda.synchronize()
        built = time.perf_counter()
        warm = warm_up(trainer, lambda text: print(text, file=sys.stderr, flush=True))
        steps = []
        for _ in range(2):
            again = time.perf_counter()
            trainer.accelerator.backward(trainer.compute_loss(model, part))
            torch.cuda.synchronize()
            steps.append(time.perf_counter() - again)
    return {
        "import_s": imported - begin,
        "build_s": built - imported,
        "warm_up_s": warm,
        "first_step_s": steps[0],
        "second_step_s": steps[1],
        "until_the_second_step_s": warm + steps[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base")
    parser.add_argument("--packing", default="packed", choices=("packed", "shared_prompt"))
    parser.add_argument("--folder", help="keep the compiled kernels here; it must be empty or absent")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(start(args.size, args.packing)))
        return
    import torch

    from kimi_rl.run_dir import describe_environment, gpu_names

    if not torch.cuda.is_available():
        sys.exit("error: warm_start: nothing is compiled on a CPU; run it on a machine with an NVIDIA card")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary) / "cache"
        if folder.exists() and any(folder.iterdir()):
            sys.exit(f"error: --folder: {folder} is not empty; give one in which nothing is compiled yet")
        environment = os.environ | cache_environment(str(folder)) | tuned_environment(gpu_names())
        command = [sys.executable, __file__, "--one", "--size", args.size, "--packing", args.packing]
        starts = {}
        for name in ("empty", "warm"):
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            starts[name] = json.loads(done.stdout.strip().splitlines()[-1])
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    found = {
        "benchmark": "warm_start",
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(),
        "model": args.size,
        "packing": args.packing,
        "starts": starts,
        "cache_bytes": size,
        "environment": describe_environment(),
    }
    hand_in(found, args.out)


if __name__ == "__main__":
    main()
