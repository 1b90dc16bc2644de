"""The vLLM rollout engine: vLLM in this process, on a CPU (through `vllm_plugin`) or on an NVIDIA GPU."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import kimi_rl
from kimi_rl.card_share import CARD_SHARE
from kimi_rl.errors import InputError
from kimi_rl.rollout.engine import Completion, Request, SamplingParams
from kimi_rl.rollout.vllm_plugin import register, sampler_front, steady_groups
from kimi_rl.rollout.vllm_plugin.direct import DirectWrites
from kimi_rl.rollout.vllm_plugin.layerwise import LayerwiseReload
from kimi_rl.rollout.vllm_plugin.served import served_tensors
from kimi_rl.rollout.vllm_plugin.steady_threads import steady_threads
from kimi_rl.weight_sync import KEPT_FLOAT32, ChecksumBatch, WeightSyncError, checksum_all

log = logging.getLogger(__name__)

_ON_CPU = not torch.cuda.is_available()
_EXACT = not _ON_CPU  # whether weights are read back bit by bit
# vLLM reads these when it is imported, so they are set here, before anything imports it.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights are loaded into a model in this process
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
_CPU_ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # workers share the machine with the learner
}
for _name, _value in (_ENVIRONMENT | (_CPU_ENVIRONMENT if _ON_CPU else {})).items():
    os.environ.setdefault(_name, _value)

# What this class decides, because log-probs, seeds or weight updates would be wrong otherwise.
_RESERVED = {
    "model": "it is the run's model",
    "dtype": "it is chosen by the device",
    "max_model_len": "it follows from the recipe's lengths",
    "max_num_seqs": "set rollout.batch_size",
    "seed": "set the recipe's seed",
    "logprobs_mode": "the learner needs the log-probs that tokens are drawn with",
    "skip_tokenizer_init": "prompts are token ids",
    "quantization": "weight updates are unquantised",
}
_PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


class _Arrivals:
    """Checksums of what was handed to the loader: as it came, and of the same values in the dtype served.

    They are queued on the device while tensors stream by, and waited for once, at the end.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._sent = ChecksumBatch()
        self._served = ChecksumBatch()

    def add(self, name: str, tensor: torch.Tensor, as_served: torch.Tensor | None) -> None:
        """`as_served` is None where the very bytes of `tensor` are served."""
        self.names.add(name)
        self._sent.add(name, tensor)
        if as_served is not None:
            self._served.add(name, _readable(as_served))

    def result(self) -> dict[str, tuple[int, int]]:
        """By name: checksum of what came, and the one that reading it back must give."""
        sent, served = self._sent.result(), self._served.result()
        return {name: (checksum, served.get(name, checksum)) for name, checksum in sent.items()}


class VLLMEngine:
    """`RolloutEngine` on vLLM (vllm-cpu 0.32 on a CPU, vLLM 0.26 on a GPU), one device, no extra process.

    A weight update loads whole checkpoints through vLLM's layer-wise reload, which repacks fused and absorbed
    weights in place, so captured CUDA graphs see the new values (or writes them there itself, where possible on a card;
    see `vllm_plugin/direct.py`). Before a version is served, every tensor is read back from what the kernels
    hold (see `vllm_plugin/served.py`) and compared with what was sent.

    Args:
        model_folder: checkpoint in Hugging Face layout under the published names (`save_model`); it needs no
            tokenizer.
        max_model_len: longest prompt plus completion, in tokens.
        max_num_seqs: sequences decoded together.
        dtype: "float32" or "bfloat16"; `A_log`, `dt_bias`, convolutions and recurrent state stay float32.
        engine_args: more arguments of `vllm.LLM`; those in `_RESERVED` are refused.

    Raises:
        InputError: on a refused argument, or a checkpoint that vLLM would load and compute differently.
    """

    def __init__(
        self,
        model_folder: str,
        *,
        max_model_len: int,
        max_num_seqs: int,
        dtype: str = "float32",
        engine_args: dict[str, Any] | None = None,
        seed: int = 0,
    ):
        folder = Path(model_folder)
        self.policy_version = -1
        self.max_model_len = max_model_len
        self._eos_ids = _check_config(folder)
        self._shapes = _checkpoint_shapes(folder)
        self._llm = start_vllm(
            folder,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            dtype=dtype,
            engine_args=engine_args,
            seed=seed,
        )
        held: list[torch.nn.Module] = []
        self._llm.apply_model(held.append)
        self._model = held[0]
        self.device = next(self._model.parameters()).device  # asked now: in an update they are on `meta`
        config = self._llm.llm_engine.vllm_config
        self._loader = DirectWrites.of(self._model, self._shapes) or LayerwiseReload(self._model, config)
        with steady_threads():
            self._dtypes = {name: tensor.dtype for name, tensor in served_tensors(self._model, self._shapes)}
        for name, served in self._dtypes.items():
            if name.endswith(KEPT_FLOAT32) and served != torch.float32:
                log.warning("this vLLM keeps %s in %s, the learner in torch.float32", name, served)
        self._refusal: str | None = None  # why `generate` is refused; None when it is not
        self._reloading = False  # between the beginning of an update and its `_finalize`
        self._arrivals = _Arrivals()
        self._sent: dict[str, tuple[int, int]] = {}  # of the last update; see `_Arrivals.result`
        self._verified: dict[str, int] | None = None  # checksums of a loaded, unfinished update

    def served_dtypes(self) -> dict[str, torch.dtype]:
        """The dtype each tensor is served in, by checkpoint name: sending it so saves bytes and loses nothing."""
        return dict(self._dtypes)

    # --- generation -----------------------------------------------------------------------------------------

    @steady_threads()
    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        if self._refusal is not None:
            raise RuntimeError(self._refusal)
        from vllm import SamplingParams as VLLMSamplingParams

        for index, request in enumerate(requests):
            if not 0 < len(request.prompt_ids) < self.max_model_len:
                raise InputError(
                    f"request {index}: the prompt has {len(request.prompt_ids)} tokens; "
                    f"the engine takes 1 to {self.max_model_len - 1} (max_model_len - 1)"
                )
        settings = [
            VLLMSamplingParams(
                max_tokens=params.max_tokens,
                temperature=params.temperature,
                top_p=params.top_p if params.temperature > 0 else 1.0,
                stop_token_ids=self._eos_ids,
                detokenize=False,
                **self._llm.kimi_rl_host_path.request_arguments(
                    generator_seed(request.seed), greedy=params.temperature == 0
                ),
            )
            for request in requests
        ]
        try:
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(request.prompt_ids)} for request in requests],
                settings,
                use_tqdm=False,
            )
        except BaseException as error:
            # vLLM may still hold some of these requests; a later call would get their tokens.
            self._refusal = (
                f"the engine failed while generating ({type(error).__name__}: {error}); start a new one"
            )
            raise
        return [self._completion(output.outputs[0]) for output in outputs]

    @steady_threads()
    def score(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs (temperature 1) that prefilling prompt and completion gives to each completion's tokens."""
        if self._refusal is not None:
            raise RuntimeError(self._refusal)
        from vllm import SamplingParams as VLLMSamplingParams

        outputs = self._llm.generate(
            [{"prompt_token_ids": [*p, *c]} for p, c in zip(prompts, completions, strict=True)],
            VLLMSamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False),
            use_tqdm=False,
        )
        return [
            [step[token].logprob for token, step in zip(c, o.prompt_logprobs[len(p) :], strict=True)]
            for p, c, o in zip(prompts, completions, outputs, strict=True)
        ]

    def _completion(self, output: Any) -> Completion:
        tokens = list(output.token_ids)
        logprobs = list(output.logprobs)
        if logprobs and not isinstance(logprobs[0], float):  # vLLM's own form
            logprobs = [step[token].logprob for token, step in zip(tokens, logprobs, strict=True)]
        reason = output.finish_reason if output.finish_reason in ("stop", "length") else "abort"
        return Completion(tokens, logprobs, reason, self.policy_version)

    # --- weight updates -------------------------------------------------------------------------------------

    @steady_threads()
    def begin_update(self) -> None:
        self._refusal = (
            "the engine holds an incomplete weight update; send the whole update again before generating"
        )
        self._arrivals, self._sent, self._verified = _Arrivals(), {}, None
        if self._reloading:  # an earlier update failed half-way: leave vLLM's loader in its resting state
            self._finalize()
        caching = self._llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
        if not self._llm.reset_prefix_cache() and caching:
            raise WeightSyncError("vLLM kept its prefix cache, which holds states that the old weights computed")
        self._reloading = True
        self._loader.begin()

    @steady_threads()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """May be called several times in an update, with whole layers: never a part of a fused parameter."""
        if not self._reloading:
            raise WeightSyncError("load_weights outside an update; call begin_update first")
        self._loader.write(self._inspect(weights))

    def _inspect(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Check each tensor on its way to vLLM's loader, and keep its checksums."""
        for name, tensor in weights:
            if name not in self._shapes:
                raise WeightSyncError(f"tensor {name} is not in the engine's checkpoint")
            if name in self._arrivals.names:
                raise WeightSyncError(f"tensor {name} came twice in one update")
            shape = self._shapes[name]
            if tensor.shape != shape and not (name.endswith(".A_log") and tensor.numel() == shape.numel()):
                raise WeightSyncError(
                    f"tensor {name} has shape {tuple(tensor.shape)}, the engine needs {tuple(shape)}"
                )
            if name.endswith(KEPT_FLOAT32) and tensor.dtype != torch.float32:
                raise WeightSyncError(
                    f"tensor {name} came in {tensor.dtype}; it is kept in float32 and must be sent so"
                )
            tensor = tensor.detach().to(self.device, non_blocking=True)
            same = _EXACT and tensor.dtype == self._dtypes[name] and tensor.shape == shape
            self._arrivals.add(name, tensor, None if same else tensor.reshape(shape).to(self._dtypes[name]))
            yield name, self._as_loaded(name, tensor)

    def _as_loaded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """`A_log` in the number of dimensions that this vLLM's parameter has: [H] or [1, 1, H, 1]."""
        if not name.endswith(".A_log"):
            return tensor
        target = self._model.get_parameter(name)
        return tensor.reshape(-1) if target.ndim == 1 else tensor.reshape(1, 1, -1, 1)

    @steady_threads()
    def finish_update(self, version: int) -> None:
        self._complete_update()
        self._verified = None
        self.policy_version = version
        self._refusal = None

    def _complete_update(self) -> None:
        """Finish loading and compare every tensor that is now held with what was sent."""
        if self._verified is not None:
            return
        if not self._reloading:
            raise WeightSyncError("no weight update to finish; call begin_update and load_weights first")
        if missing := [name for name in self._shapes if name not in self._arrivals.names]:
            raise WeightSyncError(
                f"{len(missing)} tensors of the checkpoint were not sent, first {missing[0]}"
            )
        self._finalize()
        self._sent = self._arrivals.result()
        self._arrivals = _Arrivals()
        held = self._read_back()
        wrong = [name for name, (sent, _) in self._sent.items() if held[name] != sent]
        if wrong:
            raise WeightSyncError(
                f"{len(wrong)} tensors differ from what was sent after loading, first {wrong[0]}"
            )
        self._verified = held

    def _finalize(self) -> None:
        self._loader.finish()
        self._reloading = False

    @steady_threads()
    def checksums(self) -> dict[str, int]:
        """Checksum of every tensor that is held, by checkpoint name, read from what the kernels hold.

        A tensor that equals the one last sent, in the dtype it is served in, has the checksum of that one
        as it was sent; any other has the checksum of what is held. Within an update this finishes the
        loading first. Costs about one forward over `hidden_size` tokens on a CPU.
        """
        if self._refusal is None:
            return self._read_back()
        self._complete_update()
        return dict(self._verified)

    def _read_back(self) -> dict[str, int]:
        found = checksum_all(
            (name, _readable(tensor)) for name, tensor in served_tensors(self._model, self._shapes)
        )
        for name, (sent, served) in self._sent.items():
            if found[name] == served:
                found[name] = sent
        return found

    def close(self) -> None:
        """Free the model and caches, for good; another engine may be made in this process."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._refusal = "the engine is closed"
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = self._model = self._loader = None
        cleanup_dist_env_and_memory()


def start_vllm(
    folder: Path,
    *,
    max_model_len: int,
    max_num_seqs: int,
    dtype: str = "float32",
    engine_args: dict[str, Any] | None = None,
    seed: int = 0,
) -> Any:
    """`vllm.LLM` on a folder, with what this package decides for every engine. Raises InputError on bad arguments.

    Its `kimi_rl_host_path` says which requests' log-probs and seeds go which way (see `vllm_plugin/sampler_front.py`).
    """
    arguments = _arguments(engine_args or {}, max_model_len)
    _make_importable()

    from vllm import LLM

    register()
    set_num_threads = torch.set_num_threads
    try:
        with steady_threads(), _alone_on_the_card(arguments):
            llm = LLM(
                model=str(folder),
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                seed=seed,
                skip_tokenizer_init=True,
                logprobs_mode="processed_logprobs",
                **arguments,
            )
    finally:
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker replaces it by a warning
    llm.kimi_rl_host_path = sampler_front.attach(llm)
    steady_groups.attach(llm)
    return llm


@contextlib.contextmanager
def _alone_on_the_card(arguments: dict[str, Any]) -> Iterator[None]:
    """Engines of this user start one after another, but for those that are told the size of their cache.

    vLLM takes for its own what anybody takes or frees on the card while it measures how much a cache may have.
    """
    if _ON_CPU or "kv_cache_memory_bytes" in arguments:
        yield
        return
    with open(Path(tempfile.gettempdir()) / f"kimi_rl_{os.getuid()}_starts_vllm", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed, or its process dies
        yield


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """On a CPU, `tensor` with -0.0 made 0.0, for reading a packed weight back loses the sign of zero."""
    return tensor if _EXACT else tensor + 0.0


def generator_seed(seed: int) -> int:
    """`seed` (64 bits) scrambled by splitmix64 into the 63 bits that vLLM takes.

    torch's CPU generator reads the low 32 bits alone: unscrambled, seeds that differ above them would draw
    the same.
    """
    x = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (x ^ (x >> 31)) & 0x7FFFFFFFFFFFFFFF


def _arguments(engine_args: dict[str, Any], max_model_len: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM`: the user's over our defaults."""
    for name, reason in _RESERVED.items():
        if name in engine_args:
            raise InputError(f"rollout.engine_args.{name}: cannot be set; {reason}")
    for name in _PARALLEL:
        if engine_args.get(name, 1) != 1:
            raise InputError(
                f"rollout.engine_args.{name}: found {engine_args[name]}; use 1 and more rollout workers"
            )
    defaults: dict[str, Any] = {
        "enable_prefix_caching": False,
        "use_tqdm_on_load": False,
        "generation_config": "vllm",  # the recipe decides how to sample, not the model
    }
    if not _ON_CPU:
        defaults["gpu_memory_utilization"] = CARD_SHARE
        defaults["hf_overrides"] = {"head_dtype": "float32"}  # as in the learner
    else:
        # MLA on a CPU cannot split a prompt over steps, and for other models vLLM 0.32 takes back what a seeded request
        # drew meanwhile from a place that a CPU's generator has not. So a step must have room for the longest one.
        defaults |= {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(max_model_len, 4096),
        }
    return defaults | engine_args


def _check_config(folder: Path) -> list[int]:
    """Stop token ids of the checkpoint. `InputError` where vLLM would silently compute something else."""
    if not (folder / "config.json").is_file():
        raise InputError(
            f"model.path: {folder} has no config.json; give a checkpoint folder in Hugging Face layout"
        )
    config = json.loads((folder / "config.json").read_text())
    if config.get("tie_word_embeddings"):
        raise InputError(
            f"{folder}/config.json: tie_word_embeddings is true; vLLM does not tie them for this model"
        )
    if not _ON_CPU and config.get("rms_norm_eps", 1e-5) != 1e-5:
        raise InputError(
            f"{folder}/config.json: rms_norm_eps is {config['rms_norm_eps']}; vLLM's KDA fixes it at 1e-05"
        )
    return stop_ids(folder)


def stop_ids(folder: Path) -> list[int]:
    """The tokens that end a completion, as the checkpoint says."""
    config = json.loads((folder / "config.json").read_text())
    generation = folder / "generation_config.json"
    eos = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
    eos = config.get("eos_token_id") if eos is None else eos
    return list(eos) if isinstance(eos, list) else [] if eos is None else [eos]


def _checkpoint_shapes(folder: Path) -> dict[str, torch.Size]:
    """Names and shapes of all tensors in the folder's safetensors files, layer by layer."""
    shapes: dict[str, torch.Size] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not iterable)
                shapes[name] = torch.Size(opened.get_slice(name).get_shape())
    if not shapes:
        raise InputError(f"model.path: {folder} has no *.safetensors")
    # Parts of one fused parameter share all of their name but one component: sorting brings layers together.
    return dict(sorted(shapes.items()))


def _make_importable() -> None:
    """vLLM inspects model classes in a child process, which must find this package in a checkout too."""
    root = str(Path(kimi_rl.__file__).resolve().parent.parent)
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root not in known and root not in sys.path[1:]:
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, known)])
