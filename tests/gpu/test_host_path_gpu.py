"""The vLLM engine's host path on a card: draws by seed and position, lean log-probs, and how many engines to take."""

import pytest
import torch

from kimi_rl.kernels.keyed_draw import keyed_draw, keyed_draw_reference

pytestmark = pytest.mark.gpu

PROMPTS, TOKENS = 48, 40


@pytest.mark.parametrize("vocabulary", [512, 32768, 163840])
def test_the_kernel_draws_what_the_plain_form_draws(vocabulary):
    torch.manual_seed(vocabulary)
    rows = 64
    logits = torch.randn(rows, vocabulary, device="cuda") * 3
    logits[1, 40:] = float("-inf")
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), device="cuda")
    positions = torch.arange(rows, device="cuda", dtype=torch.int32) * 1001
    for temperature in (None, torch.rand(rows, device="cuda") + 0.5):
        tokens, logprobs = keyed_draw(logits, seeds, positions, temperature)
        expected, expected_logprobs = keyed_draw_reference(logits, seeds, positions, temperature)
        assert (tokens == expected).sum() >= rows - 1  # the last bit of a logarithm may decide between two tokens
        same = tokens == expected
        torch.testing.assert_close(logprobs[same], expected_logprobs[same], rtol=1e-4, atol=1e-4)


def test_draws_follow_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, float("-inf"), 2.0, -3.0], device="cuda").expand(200_000, -1)
    seeds = torch.arange(200_000, device="cuda") * 7919
    tokens, _ = keyed_draw(logits, seeds, torch.zeros(200_000, dtype=torch.int32, device="cuda"))
    expected = logits[0].softmax(-1)
    error = (expected * (1 - expected) / len(tokens)).sqrt()
    assert ((torch.bincount(tokens.long(), minlength=6) / len(tokens) - expected).abs() <= 5 * error).all()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    pytest.importorskip("vllm")
    from kimi_rl.model.load_save import save_model
    from kimi_rl.model.modeling import KimiLinearForCausalLM
    from kimi_rl.model.presets import build_config
    from kimi_rl.recipe import ModelSection
    from kimi_rl.rollout.vllm_engine import VLLMEngine

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(build_config(ModelSection(arch="hybrid", size="base"), vocab_size=4096, **ids))
    folder = save_model(model, None, tmp_path_factory.mktemp("engine") / "model")
    arguments = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**31}
    engine = VLLMEngine(str(folder), max_model_len=600, max_num_seqs=16, dtype="bfloat16", engine_args=arguments)
    yield engine
    engine.close()


def requests():
    from kimi_rl.rollout.engine import Request

    return [Request([10 + i % 90] * (440 + i), seed=2**40 + i) for i in range(PROMPTS)]  # across the border at 480


def test_lean_logprobs_are_vllms_own(engine, monkeypatch):
    """Bit by bit, greedily: the kernels are the same. Three times as many requests as seats."""
    from kimi_rl.rollout.engine import SamplingParams

    lean = engine.generate(requests(), SamplingParams(TOKENS, temperature=0.0))
    monkeypatch.setenv("KIMI_RL_LEAN_LOGPROBS", "0")
    assert engine.generate(requests(), SamplingParams(TOKENS, temperature=0.0)) == lean


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_seeds_decide_and_logprobs_are_those_drawn_with(engine, monkeypatch, top_p):
    from kimi_rl.rollout.engine import Request, SamplingParams

    assert engine._llm.kimi_rl_host_path.keyed
    params = SamplingParams(TOKENS, temperature=1.0, top_p=top_p)
    keyed = engine.generate(requests(), params)
    assert engine.generate(requests(), params) == keyed
    others = engine.generate([Request(r.prompt_ids, r.seed + 1) for r in requests()], params)
    assert sum(a.token_ids == b.token_ids for a, b in zip(keyed, others, strict=True)) <= 2
    if top_p == 1.0:  # decoding and prefilling differ by rounding alone
        first = requests()[:8]
        scored = engine.score([r.prompt_ids for r in first], [c.token_ids for c in keyed[:8]])
        gaps = [abs(a - b) for c, s in zip(keyed, scored, strict=False) for a, b in zip(c.logprobs, s, strict=True)]
        assert sum(gaps) / len(gaps) < 0.1
    monkeypatch.setenv("KIMI_RL_KEYED_SAMPLING", "0")
    plain = engine.generate(requests(), params)  # vLLM's generators: other draws of the same distribution
    means = [torch.tensor([sum(c.logprobs) / len(c.logprobs) for c in answers]) for answers in (keyed, plain)]
    error = (means[0].var() / PROMPTS + means[1].var() / PROMPTS).sqrt()
    assert (means[0].mean() - means[1].mean()).abs() < 5 * error


def test_steps_are_timed_on_host_and_card(engine):
    from kimi_rl.rollout.decode_windows import DecodeBatch

    with DecodeBatch(engine, [[20 + i] * 100 for i in range(16)], 200, seeds=range(16)) as batch:
        step_s, gpu_s = batch.seconds(40) / 40, batch.gpu_seconds()
    assert 0 < gpu_s < step_s < 0.5
