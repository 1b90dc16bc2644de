"""Weight sync on one card: learner and worker are two processes, and weights go from one to the other by CUDA IPC."""

import pytest
import ray
import torch

from kimi_rl.model.load_save import create_model, load_model, save_model
from kimi_rl.model.naming import to_checkpoint
from kimi_rl.recipe import ModelSection, RolloutSection, TokenizerSection
from kimi_rl.rollout.engine import Request, SamplingParams
from kimi_rl.rollout.pool import RolloutPool, pool_settings
from kimi_rl.tokenizer import build_tokenizer
from kimi_rl.weight_sync import CudaIpcSync, checksum_all, tensor_checksum, unpack

pytestmark = pytest.mark.gpu


@ray.remote
class Peer:
    """A second process on the card."""

    def receive(self, update):
        """Checksums of what arrived, its devices, and where the first tensor lies in this process."""
        tensors = dict(unpack(update))
        devices = {tensor.device.type for tensor in tensors.values()}
        return checksum_all(tensors.items()), devices, next(iter(tensors.values())).data_ptr()


@pytest.fixture(scope="module")
def ray_gpu():
    from kimi_rl.pipeline import local_ray

    with local_ray():
        yield


def tensors(seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    yield "model.embed_tokens.weight", torch.randn(1000, 257, generator=generator, device="cuda")
    for layer in range(3):
        yield f"model.layers.{layer}.self_attn.A_log", torch.randn(5, generator=generator, device="cuda")
        yield f"model.layers.{layer}.mlp.up_proj.weight", torch.randn(511, 300, generator=generator, device="cuda")
    yield "lm_head.weight", torch.randn(1000, 257, generator=generator, device="cuda")


def test_checksums_are_those_of_the_cpu():
    for name, tensor in tensors(0):
        for dtype in (torch.float32, torch.bfloat16):
            on_card = tensor.to(dtype)
            assert checksum_all([(name, on_card)])[name] == tensor_checksum(on_card.cpu()), (name, dtype)
    large = torch.randn(9000, 9000, device="cuda")  # more than one round of kernels
    assert checksum_all([("w", large)])["w"] == tensor_checksum(large.cpu())


def test_ipc_carries_every_version_to_two_other_processes(ray_gpu):
    peers = [Peer.options(num_gpus=0.25).remote() for _ in range(2)]
    served = {name: torch.bfloat16 for name, _ in tensors(0)} | {"lm_head.weight": torch.float32}
    sync = CudaIpcSync(served)
    places = set()
    for version in range(1, 5):
        update, times = sync.pack(tensors(version), version)
        expected = {
            name: tensor_checksum(t if name.endswith(("A_log", "lm_head.weight")) else t.bfloat16())
            for name, t in tensors(version)
        }
        assert update.checksums == expected
        for peer, (sums, devices, place) in zip(peers, ray.get([p.receive.remote(update) for p in peers]), strict=True):
            assert sums == expected and devices == {"cuda"}
            places.add((peer, place))
    assert len(places) == 2, "each process maps the buffer once and keeps it"
    ray.kill(peers.pop())
    late = Peer.options(num_gpus=0.25).remote()  # as a replacement worker: it opens the same handle
    assert ray.get(late.receive.remote(update))[0] == expected
    for peer in (*peers, late):
        ray.kill(peer)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """vLLM's MLA kernels on a card take the released model's head sizes, which presets from `small` on have."""
    tokenizer = build_tokenizer(TokenizerSection(), [])
    folder = tmp_path_factory.mktemp("small") / "model"
    return save_model(create_model(ModelSection(size="small"), tokenizer, seed=7), tokenizer, folder)


def served_answers(pool, model, version):
    """Token ids of 8 answers. The engine's own log-probs must be those of `model`: it serves that and nothing else."""
    requests = [Request([20 + i, 30, 40], i) for i in range(8)]
    completions = pool.generate(requests, SamplingParams(16, 0.0))
    assert {c.policy_version for c in completions} == {version}
    differences = []
    for request, completion in zip(requests, completions, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *completion.token_ids]], device=model.device)
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):  # as in a training step
            logits = model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1].float()
        theirs = logits.log_softmax(-1).gather(-1, ids[0, len(request.prompt_ids) :, None]).squeeze(-1)
        differences.append((theirs.cpu() - torch.tensor(completion.logprobs)).abs())
    assert torch.cat(differences).mean() < 0.1
    return [c.token_ids for c in completions]


def check_versions(pool, model, transport):
    """Weights that move three times, each served before the next, by this transport and without a restart."""
    answers = []
    for version in range(3):
        times = pool.update_weights(to_checkpoint(model), version)
        assert times.transport == transport
        print(times)
        answers.append(served_answers(pool, model, version))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    assert len({str(a) for a in answers}) == 3, "weights that move must change the answers"
    assert pool.restarts == 0


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
@pytest.mark.parametrize("weight_sync", ["auto", "object_store"])
def test_a_pool_serves_the_new_weights(ray_gpu, small_model, engine, weight_sync):
    if engine == "vllm":
        pytest.importorskip("vllm")
    folder = str(small_model)
    model = load_model(folder, device="cuda")
    section = RolloutSection(engine=engine, batch_size=8, weight_sync=weight_sync)
    pool = RolloutPool(
        **pool_settings(section, model_folder=folder, max_model_len=64, seed=0, threads=2, device="cuda")
    )
    try:
        check_versions(pool, model, "object_store" if weight_sync == "object_store" else "cuda_ipc")
    finally:
        pool.close()
