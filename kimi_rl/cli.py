"""The `kimi-rl` command. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from kimi_rl import __version__
from kimi_rl.convert import command as convert_command
from kimi_rl.errors import InputError, RunError

app = typer.Typer(
    name="kimi-rl",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""RL post-training for the Kimi Linear hybrid.

    Start with `kimi-rl train recipes/quickstart.yaml --out runs/first`, then open `runs/first/report.html`.

    Exit codes: 0 done, 1 the run failed, 2 bad input (one line says what and where).""",
)

bench = typer.Typer(no_args_is_help=True, help="Measure: trainer against engine, weight sync, decoding, the learner.")
app.add_typer(bench, name="bench")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


@app.command(
    epilog="Example: `kimi-rl train recipes/quickstart.yaml seed=1 stages.rlvr.steps=50 --out runs/seed1`"
)
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML); see recipes/README.md.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, dotted: `seed=1`, `stages.rlvr.learning_rate=1e-4`."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; must be new or empty. Default: runs/<name>.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last complete checkpoint in the run directory.")] = False,
    until: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Stop after this stage; --resume goes on from there.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Run a recipe: its SFT and RLVR stages in order, through Ray.

    Everything lands in the run directory: `recipe.yaml` (resolved), `metrics.jsonl`, `rollouts/`, `stages/` with
    checkpoints, `model/` (Hugging Face layout), `summary.json` and `report.html`.
    """
    from kimi_rl.pipeline import train as run
    from kimi_rl.progress import ProgressView
    from kimi_rl.recipe_load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    target = out or Path("runs") / loaded.name
    with ProgressView(enabled=not as_json) as view:
        summary = run(loaded, target, resume=resume, view=view, until=until)
    if as_json:
        print_json(summary)
        return
    from kimi_rl.report import render_text_summary

    typer.echo(render_text_summary(target))
    typer.echo(f"report: {target / 'report.html'}")


@app.command(epilog="Example: `kimi-rl compare recipes/compare_tiny.yaml --out runs/compare_tiny`")
def compare(
    file: Annotated[Path, typer.Argument(help="A comparison file (see docs/compare.md), or a recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the base recipe: `stages.rlvr.steps=50`."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for runs and report. Default: runs/<name>.")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time; more than there are cards share them.")] = 1,
    as_json: JsonFlag = False,
) -> None:
    """Compare arms (hybrid, MLA, other ratios, any override) over seeds, with intervals.

    Each arm and seed is a whole run of the base recipe. A recipe in place of a comparison file is compared as
    `hybrid` against `mla` with seeds 0, 1 and 2. The same command again goes on where it stopped: finished runs are
    kept, half-done ones resumed, failed ones tried again.
    """
    from kimi_rl.compare import compare as run
    from kimi_rl.compare import load_plan, text_summary
    from kimi_rl.compare.watch import Watch

    plan = load_plan(file, overrides or [])
    target = out or Path("runs") / plan.file.name
    with Watch(plan.runs, enabled=not as_json) as watch:
        result = run(plan, target, parallel=parallel, watch=watch)
    if as_json:
        print_json(result)
    else:
        typer.echo(text_summary(result))
        typer.echo(f"report: {target / 'compare.html'}")
    failed = [run for run in result["runs"] if run["status"] == "failed"]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(result['runs'])} runs failed, first {failed[0]['arm']} at seed "
            f"{failed[0]['seed']}: {failed[0]['error']}"
        )


@app.command(epilog="Example: `kimi-rl eval runs/first/model --data math500 --limit 200 --k 4`")
def eval(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[data.KEY=VALUE]...", help="More about the data, as in a recipe."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Task (arithmetic), data set (gsm8k, math500, a hub id), local folder or file.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N held-out problems.")] = None,
    k: Annotated[int, typer.Option(min=0, help="Samples per problem for avg@k, pass@k, maj@k; 0: greedy.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.01, help="Temperature of the k samples.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    engine: Annotated[str, typer.Option(help="auto, transformers or vllm.")] = "auto",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Write one JSON line per problem to this file.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure a model's held-out accuracy: greedy, avg@k, unbiased pass@k and maj@k.

    Each with a standard error clustered by problem and a 95 % interval; see docs/evaluation.md.
    """
    from kimi_rl.standalone import evaluate_model

    figures, records = evaluate_model(
        model,
        data,
        overrides or [],
        limit=limit,
        k=k,
        temperature=temperature,
        max_tokens=max_tokens,
        engine=engine,
        seed=seed,
    )
    if out is not None:
        from kimi_rl.run_dir import atomic_write_text

        atomic_write_text(out, "".join(json.dumps(record) + "\n" for record in records))
    if as_json:
        print_json(figures)
        return
    typer.echo(f"{figures['data']}, n={figures['n']}; asked after the question: {figures['instruction'] or 'nothing'}")
    shown = [("greedy accuracy", "held_out_accuracy", "held_out")]
    shown += [(f"{name}@{k}", f"{name}_at_k", f"{name}_at_k") for name in ("avg", "pass", "maj") if k]
    for name, value, key in shown:
        low, high = figures[f"{key}_interval"]
        typer.echo(f"{name} {figures[value]:.3f} ± {figures[f'{key}_se']:.3f} (95 %: {low:.3f} to {high:.3f})")
    if k:
        typer.echo(f"the {k} samples: at temperature {temperature}")
    if figures["dropped"]:
        typer.echo(f"left out, gold answer unusable: {len(figures['dropped'])} (--json names them)")
    typer.echo(f"cut off at {max_tokens} tokens: {figures['truncated_share']:.1%}; no answer: "
               f"{figures['no_answer_share']:.1%}")


@app.command(epilog="Example: `kimi-rl select runs/sft/model gsm8k --k 8 --out data/train.jsonl`")
def select(
    model: Annotated[str, typer.Argument(help="Model folder or hub id: the checkpoint that training will start from.")],
    data: Annotated[str, typer.Argument(help="Task, data set, folder or file, whose training problems are scored.")],
    out: Annotated[Path, typer.Option(help="JSON lines file for the kept problems, with their `pass_rate`.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[data.KEY=VALUE]...", help="More about the data, as in a recipe."),
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Samples per problem.")] = 8,
    low: Annotated[float, typer.Option(help="Keep problems solved at least this often ...")] = 0.2,
    high: Annotated[float, typer.Option(help="... and at most this often.")] = 0.8,
    temperature: Annotated[float, typer.Option(min=0.01)] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    engine: Annotated[str, typer.Option(help="auto, transformers or vllm.")] = "auto",
    kind: Annotated[str, typer.Option(help="How answers compare, as reward.kind; auto: what the data needs.")] = "auto",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Keep the training problems that a model solves sometimes: pass rate between --low and --high.

    Train on them with `data.path`, in a folder with the test.jsonl of your choice. See docs/evaluation.md.
    """
    from kimi_rl.standalone import select_problems

    counts = select_problems(
        model,
        data,
        overrides or [],
        k=k,
        low=low,
        high=high,
        out=out,
        temperature=temperature,
        max_tokens=max_tokens,
        engine=engine,
        kind=kind,
        seed=seed,
        progress=lambda done, of: typer.echo(f"scored {done} of {of}", err=True),
    )
    if as_json:
        print_json(counts)
        return
    typer.echo(
        f"kept {counts['kept']} of {counts['scored']} problems: {counts['too_hard']} solved in under {low:g} of the "
        f"{k} samples, {counts['too_easy']} in over {high:g}, {counts['unmeasured']} unmeasured; "
        f"mean pass rate {counts['mean_pass_rate']:.3f}"
    )
    typer.echo(f"written: {out}")


@app.command(epilog='Example: `kimi-rl generate runs/first/model --prompts prompts.jsonl --greedy --json`')
def generate(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    prompts: Annotated[
        Path, typer.Option(help='JSON lines: {"prompt": text} (put through the chat template) or {"prompt_ids": [..]}.')
    ],
    engine: Annotated[str, typer.Option(help="auto, transformers or vllm.")] = "auto",
    greedy: Annotated[bool, typer.Option(help="Take the most likely token each time.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01)] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0)] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same samples.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Complete prompts with a model, one line each.

    With `--json`: one object a prompt with `prompt_ids`, `token_ids`, `logprobs` (of each sampled token, after
    temperature and top-p), `text` and `finish_reason`.
    """
    from kimi_rl.standalone import generate_from_file

    for answer in generate_from_file(
        model,
        prompts,
        engine=engine,
        temperature=0.0 if greedy else temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        seed=seed,
    ):
        typer.echo(json.dumps(answer) if as_json else f"[{answer['finish_reason']}] {answer['text']}")


app.command("convert", epilog=convert_command.EPILOG)(convert_command.convert)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    as_json: JsonFlag = False,
) -> None:
    """Write `report.html` for finished, running or failed runs."""
    from kimi_rl.report import render_text_summary, write_report

    written = []
    for run in runs:
        if not (run / "recipe.yaml").is_file():
            raise InputError(f"{run}: no run (it has no recipe.yaml); give a folder made by `kimi-rl train`")
        written.append(str(write_report(run)))
        if not as_json:
            typer.echo(render_text_summary(run))
            typer.echo(f"report: {written[-1]}")
    if as_json:
        print_json({"reports": written})


@app.command(epilog=r"Example: `kimi-rl verify --gold '\frac{1}{2}' --answer 0.5`")
def verify(
    gold: Annotated[str | None, typer.Option(help="The reference answer.")] = None,
    answer: Annotated[str | None, typer.Option(help="The answer to judge, without any marker.")] = None,
    completion: Annotated[str | None, typer.Option(help="A whole completion to extract the answer from.")] = None,
    cases: Annotated[
        Path | None, typer.Option(help="JSON lines with `gold` and `completion` or `answer`; one verdict each.")
    ] = None,
    kind: Annotated[
        str, typer.Option(help="`math` (equivalence), `exact`, `integer`, `choice`, or package.module:function.")
    ] = "math",
    as_json: JsonFlag = False,
) -> None:
    """Say which verdict an answer gets, and why."""
    from kimi_rl.standalone import verify_cases

    rows = verify_cases(gold=gold, answer=answer, completion=completion, cases=cases, kind=kind)
    for row in rows:
        typer.echo(json.dumps(row) if as_json else f"{row['status']}: {row['reason']} (value {row['value']})")


EngineArgs = Annotated[
    list[str] | None, typer.Option("--engine-arg", metavar="KEY=VALUE", help="Passed to the vLLM engine; repeatable.")
]


@bench.command(epilog="Example: `kimi-rl bench parity runs/first/model --engine vllm --steps 5`")
def parity(
    model: Annotated[str, typer.Argument(help="Model folder.")],
    engine: Annotated[str, typer.Option(help="auto, transformers or vllm.")] = "auto",
    steps: Annotated[int, typer.Option(min=1)] = 20,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts a step.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    engine_arg: EngineArgs = None,
) -> None:
    """Compare trainer and engine log-probs of the same sampled tokens, at learning rate 0. Prints JSON."""
    from kimi_rl.bench.parity import bench_parity
    from kimi_rl.standalone import check_engine, parse_engine_args

    check_engine(model, engine)
    print_json(
        bench_parity(
            model,
            engine=engine,
            steps=steps,
            prompts=prompts,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            seed=seed,
            engine_args=parse_engine_args(engine_arg or []),
        )
    )


@bench.command(epilog="Example: `kimi-rl bench sync runs/first/model --engine vllm`")
def sync(
    model: Annotated[str, typer.Argument(help="Model folder.")],
    engine: Annotated[str, typer.Option(help="auto, transformers or vllm.")] = "auto",
    transport: Annotated[str, typer.Option(help="auto, object_store, cuda_ipc, nccl, or all that work here.")] = "auto",
    workers: Annotated[int, typer.Option(min=1)] = 1,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Time weight updates: bytes, seconds, GB/s, the pause of generation, and the floor. Prints JSON."""
    from kimi_rl.bench.sync import bench_sync
    from kimi_rl.standalone import check_engine
    from kimi_rl.weight_sync import TRANSPORTS

    check_engine(model, engine)
    if transport not in (*TRANSPORTS, "all"):
        raise InputError(f"--transport: unknown transport {transport!r}; known: {', '.join(TRANSPORTS)}, all")
    print_json(bench_sync(model, engine=engine, transport=transport, workers=workers, repeats=repeats))


@bench.command(epilog="Example: `kimi-rl bench decode hybrid:large mla:large --context 4096,32768 --out decode`")
def decode(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=]MODEL...", help="Model folders, or `arch:size` of a preset (random weights)."),
    ] = None,
    op: Annotated[
        bool, typer.Option("--op", help="Instead of models: a KDA layer's step alone, kernel by kernel.")
    ] = False,
    context: Annotated[str, typer.Option(help="Context lengths in tokens, by commas.")] = "4096,8192,16384,32768",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded per measurement.")] = 32,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences decoded at once. Default: 1; with --op 64, 256 and 1024.")
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, transformers or vllm.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for decode.json, decode.csv and decode.png.")] = None,
    engine_arg: EngineArgs = None,
) -> None:
    """Time per output token and prefill time against context length, with the memory floor. Prints JSON."""
    if op:
        from kimi_rl.bench.decode_op import bench_decode_op

        if models:
            raise InputError(f"--op times a layer of its own; leave out the models, found {models[0]!r}")
        print_json(bench_decode_op([batch] if batch else [64, 256, 1024], repeats=repeats))
        return
    if not models:
        raise InputError("MODEL: none given; name model folders or presets such as hybrid:base, or give --op")
    from kimi_rl.bench.decode import bench_decode, parse_models
    from kimi_rl.compare.page import write_csv, write_png
    from kimi_rl.compare.panels import decode_panels
    from kimi_rl.run_dir import atomic_write_text
    from kimi_rl.standalone import ENGINES, parse_engine_args

    try:
        lengths = [int(part) for part in context.split(",")]
    except ValueError:
        raise InputError(f"--context: found {context!r}, expected token counts such as 4096,8192") from None
    if engine not in ENGINES:
        raise InputError(f"--engine: unknown engine {engine!r}; known: {', '.join(ENGINES)}")
    named = parse_models(models)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {out}: cannot be made ({error.strerror or error}); choose another") from None
    found = bench_decode(
        named,
        context=lengths,
        tokens=tokens,
        repeats=repeats,
        batch=batch or 1,
        engine=engine,
        engine_args=parse_engine_args(engine_arg or []),
    )
    if out is not None:
        atomic_write_text(out / "decode.json", json.dumps(found, indent=2) + "\n")
        panels = decode_panels(found)
        write_csv(out / "decode.csv", panels)
        write_png(out / "decode.png", panels, "kimi-rl bench decode")
    print_json(found)


@bench.command(epilog="Example: `kimi-rl bench rollout hybrid:base --batch 64,256 --context 1024`")
def rollout(
    model: Annotated[str, typer.Argument(help="Model folder, or `arch:size` of a preset (random weights).")],
    batch: Annotated[str, typer.Option(help="Sequences that an engine decodes together, by commas.")] = "64,256",
    context: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 1024,
    engines: Annotated[int, typer.Option(min=1, help="Engines that share the card; with --beside, of each model.")] = 4,
    runner: Annotated[str, typer.Option(help="vLLM's model runner in our engines: v1 or v2.")] = "v1",
    sequences: Annotated[int, typer.Option(min=2, help="Sequences of the check that both give the same tokens.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a window.")] = 100,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each arm; the median counts.")] = 3,
    vocabulary: Annotated[int, typer.Option(min=512, help="Of a preset.")] = 32768,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    engine_arg: EngineArgs = None,
    beside: Annotated[
        str | None, typer.Option(help="Time another model's engines in turns with this one's, and nothing else.")
    ] = None,
) -> None:
    """Decode throughput with log-probs: stock vLLM, our engine, and several of ours on one device. Prints JSON."""
    from kimi_rl.bench.decode import parse_models
    from kimi_rl.bench.rollout import bench_rollout
    from kimi_rl.bench.rollout_beside import bench_beside
    from kimi_rl.standalone import parse_engine_args

    try:
        sizes = [int(part) for part in batch.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise InputError(f"--batch: found {batch!r}, expected numbers of sequences such as 64,256")
    if runner not in ("v1", "v2"):
        raise InputError(f"--runner: found {runner!r}; use v1 or v2")
    if beside == model:
        raise InputError(f"--beside: found {beside}, the model itself; name another, such as mla:base")
    sources = list(parse_models([model, *([beside] if beside else [])]).values())
    settings = {
        "batch": sizes,
        "context": context,
        "engines": engines,
        "runner": runner,
        "steps": steps,
        "windows": windows,
        "vocabulary": vocabulary,
        "seed": seed,
        "engine_args": parse_engine_args(engine_arg or []),
    }
    if beside is None:
        print_json(bench_rollout(sources[0], sequences=sequences, **settings))
    else:
        print_json(bench_beside(*sources, **settings))


@bench.command(epilog="Example: `kimi-rl bench learner --size base --groups 8`")
def learner(
    size: Annotated[str, typer.Option(help="Preset of the model: tiny, small, base, large.")] = "base",
    arch: Annotated[str, typer.Option(help="hybrid or mla.")] = "hybrid",
    mlp: Annotated[str, typer.Option(help="dense or moe.")] = "dense",
    vocabulary: Annotated[int, typer.Option(min=512)] = 32768,
    groups: Annotated[int, typer.Option(min=1, help="Prompts in the batch.")] = 8,
    group_size: Annotated[int, typer.Option(min=2, help="Completions a prompt.")] = 16,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Completions a micro-batch.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Mean length of a prompt.")] = 100,
    mean: Annotated[float, typer.Option(min=1, help="Mean length of a completion (log-normal).")] = 300,
    longest: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 2048,
    pack_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one pack.")] = 16384,
    steps: Annotated[int, typer.Option(min=1, help="Timed optimizer steps of each path.")] = 5,
    effective_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of groups with advantages other than zero: see `without_silent`.")
    ] = 1.0,
    paths: Annotated[
        str, typer.Option(help="Which to time; `without_silent` too: without completions whose advantage is zero.")
    ] = "stock,padded,packed,shared_prompt",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Time stock TRL and the learner on padded batches, packed ones, and with shared prompts. Prints JSON."""
    from kimi_rl.kernels.compile_cache import cache_environment, tuned_environment
    from kimi_rl.run_dir import gpu_names

    os.environ.update(cache_environment() | tuned_environment(gpu_names()))  # before Triton is imported
    from kimi_rl.bench.learner import bench_learner

    for name, value, known in (("arch", arch, ("hybrid", "mla")), ("mlp", mlp, ("dense", "moe"))):
        if value not in known:
            raise InputError(f"--{name}: found {value!r}; use one of {', '.join(known)}")
    figures = bench_learner(
        size=size,
        arch=arch,
        mlp=mlp,
        vocabulary=vocabulary,
        groups=groups,
        group_size=group_size,
        micro_batch_size=micro_batch_size,
        prompt_tokens=prompt_tokens,
        mean=mean,
        longest=longest,
        pack_tokens=pack_tokens,
        steps=steps,
        seed=seed,
        effective_share=effective_share,
        paths=paths.split(","),
    )
    print_json({"command": " ".join(["kimi-rl", *sys.argv[1:]]), **figures})


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def main() -> None:
    """Entry point: bad input is one line and exit code 2, a failed run one line and exit code 1."""
    if not sys.warnoptions:  # libraries' import-time warnings would bury the one line that matters; `-W` shows them
        warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(standalone_mode=False)
    except InputError as error:
        _fail(error, 2)
    except RunError as error:
        _fail(error, 1)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        typer.echo("stopped; go on with --resume", err=True)
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error of the command line itself
            error.show()
            sys.exit(error.exit_code)
        raise


def _fail(error: Exception, code: int) -> None:
    typer.echo(f"error: {error}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
