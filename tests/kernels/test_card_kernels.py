"""The learner's Triton kernels, interpreted on the CPU, against their plain forms: values and gradients."""

import textwrap

import pytest
from triton_interpreter import interpreted

PREAMBLE = """
import torch
torch.manual_seed(SEED)

def draw(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()

def results(form, inputs, **options):
    outputs = [x for x in form(*inputs, **options) if x is not None]
    weights = [torch.linspace(-1, 1, x.numel()).reshape(x.shape) for x in outputs]
    loss = sum((x.float() * w).sum() for x, w in zip(outputs, weights))
    return outputs + list(torch.autograd.grad(loss, [x for x in inputs if x.requires_grad]))

def off(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())

def compare(form, plain, inputs, rtol=2e-5, atol=2e-5, **options):
    for a, b in zip(results(form, inputs, **options), results(plain, inputs, **options), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, (a.dtype, b.dtype, a.shape, b.shape)
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
"""

CASES = {
    "rms_norm": """
        from kimi_rl.kernels.rms_norm import rms_norm_reference
        from kimi_rl.kernels.rms_norm.triton_norm import rms_norm_triton
        def both(form):
            return lambda x, w, *gate, **o: [form(x, w, 1e-5, gate=gate[0] if gate else None, **o)]
        ours, plain = both(rms_norm_triton), both(rms_norm_reference)
        compare(ours, plain, [draw(7, 3, 6), draw(6)])
        compare(ours, plain, [draw(3000, 24), draw(24), draw(3000, 24)])
        compare(ours, plain, [draw(5, 40), draw(40)], rtol=1e-2, atol=1e-2, out_dtype=torch.bfloat16)
        compare(ours, plain, [draw(9, 8, dtype=torch.bfloat16), draw(8), draw(9, 8, dtype=torch.bfloat16)],
                rtol=2e-2, atol=2e-2)
    """,
    "swiglu": """
        from kimi_rl.kernels.swiglu import swiglu_reference
        from kimi_rl.kernels.swiglu.triton_swiglu import swiglu_triton
        both = lambda form: lambda a, b: [form(a, b)]
        compare(both(swiglu_triton), both(swiglu_reference), [draw(3, 50), draw(3, 50)])
        compare(both(swiglu_triton), both(swiglu_reference), [draw(90, 80).detach().T.requires_grad_(), draw(80, 90)])
    """,
    "kda_gate": """
        from kimi_rl.kernels.kda_gate import MAX_A_LOG, MAX_PREACTIVATION, kda_gate
        from kimi_rl.kernels.kda_gate.triton_gate import kda_gate_triton
        def ours(*args):
            return [kda_gate_triton(*args, limits=(MAX_PREACTIVATION, MAX_A_LOG))]
        plain = lambda *args: [kda_gate(*args)]
        compare(ours, plain, [draw(2, 5, 12), draw(1, 1, 2, 1), draw(12)])
        wide = (20 * torch.randn(700, 40)).requires_grad_()
        for a, b in zip(*(results(f, [wide, *rest]) for rest in [(draw(5), draw(40))] for f in (ours, plain))):
            assert off(a, b) < 5e-5
        small = torch.tensor([[-80.0, -20.0, -6.9, -1e-3, 0.0, 19.0, 21.0, 90.0]]).requires_grad_()
        exact = -torch.nn.functional.softplus(small.detach().double()).float()
        found = ours(small, torch.zeros(1), torch.zeros(8))[0].flatten(1)
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)
        extreme = torch.tensor([[-1e30, 1e30, 3e38, 5.0]]).requires_grad_()
        for a_log in (60.0, -200.0, 5.0):
            inputs = [extreme, torch.full((1,), a_log, requires_grad=True), torch.zeros(4, requires_grad=True)]
            g = ours(*inputs)[0]
            grads = torch.autograd.grad(g.clamp(min=-100).sum(), inputs)
            assert all(torch.isfinite(x).all() for x in (g, *grads)), (g, grads)
    """,
    "short_conv": """
        from kimi_rl.kernels.short_conv import short_conv_reference
        from kimi_rl.kernels.short_conv.triton_conv import short_conv_triton
        lengths = [1, 0, 2, 70, 3, 33]
        cu = torch.tensor([0, *lengths]).cumsum(0)
        def both(form):
            return lambda x, w, *state, **o: form(x, w, initial_state=state[0] if state else None, **o)
        ours, plain = both(short_conv_triton), both(short_conv_reference)
        for width in (2, 4):
            state = draw(6, 5, width - 1)
            for options in ({"cu_seqlens": cu}, {"cu_seqlens": cu, "output_final_state": True, "activation": None}):
                compare(ours, plain, [draw(1, sum(lengths), 5), draw(5, width)], **options)
            compare(ours, plain, [draw(1, sum(lengths), 5), draw(5, width), state], cu_seqlens=cu,
                    output_final_state=True)
        compare(ours, plain, [draw(3, 37, 130), draw(130, 4), draw(3, 130, 3)], output_final_state=True)
        compare(ours, plain, [draw(3, 37, 5, dtype=torch.bfloat16), draw(5, 4)], rtol=3e-2, atol=3e-2)
        # runs of a few tokens, whose ends cut sequences, and parents: long, short, without a child, of length 0
        from kimi_rl.kernels.segments import Segments
        from kimi_rl.kernels.short_conv import rows_before, triton_conv
        lengths = [9, 2, 1, 0, 5, 4, 1, 0, 2, 1, 17, 3, 1]
        bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        segments = Segments(bounds, [-1] * 5 + [0, 2, 1, 0, 1, 2, 3, 0])
        def shared(x, w):
            return short_conv_triton(x, w, cu_seqlens=segments.cu_seqlens, parents=segments)
        for triton_conv.PROGRAMS in (1, 4, 6144):
            for width in (2, 3, 4, 5):
                def joined(x, w):
                    before = rows_before(x, width - 1, segments)
                    return short_conv_reference(x, w, cu_seqlens=segments.cu_seqlens, initial_state=before)
                compare(shared, joined, [draw(1, bounds[-1], 5), draw(5, width)])
                compare(ours, plain, [draw(1, bounds[-1], 5), draw(5, width), draw(13, 5, width - 1)],
                        cu_seqlens=segments.cu_seqlens, output_final_state=True)
        lengths = [1, 0, 2, 70, 3, 33]
        a = torch.randn(1, sum(lengths), 5)
        b = a.clone(); b[:, 3:73] += 1.0
        one, other = (short_conv_triton(x, torch.ones(5, 4), cu_seqlens=cu)[0] for x in (a, b))
        difference = one - other
        assert float(difference[:, 73:].abs().max()) == 0.0 and float(difference[:, :73].abs().max()) > 0
    """,
    "logprob": """
        from kimi_rl.kernels.logprob import token_logprobs_reference
        from kimi_rl.kernels.logprob.triton_rows import token_logprobs_triton
        for vocabulary, temperature, entropy in ((300, 1.0, True), (9000, 0.7, True), (41, 1.3, False)):
            inputs = [draw(7, 24), draw(vocabulary, 24)]
            tokens = torch.randint(vocabulary, (7,))
            options = {"temperature": temperature, "with_entropy": entropy}
            ours = results(lambda h, w: token_logprobs_triton(h, w, tokens, tile=3, **options), inputs)
            plain = results(lambda h, w: token_logprobs_reference(h, w, tokens, **options), inputs)
            for a, b in zip(ours, plain, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
            options["matmul_dtype"] = torch.bfloat16
            ours = results(lambda h, w: token_logprobs_triton(h, w, tokens, tile=3, **options), inputs)
            plain = results(lambda h, w: token_logprobs_reference(h, w, tokens, **options), inputs)
            for a, b in zip(ours, plain, strict=True):
                assert off(a, b) < 0.01
        only = [draw(4, 8), draw(50, 8)]
        entropies = lambda form: lambda h, w: [form(h, w)[1]]
        tokens = torch.randint(50, (4,))
        a = results(entropies(lambda h, w: token_logprobs_triton(h, w, tokens, tile=4)), only)
        b = results(entropies(lambda h, w: token_logprobs_reference(h, w, tokens)), only)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5)
    """,
    "distill_loss": """
        import itertools
        from kimi_rl.kernels.distill_loss import distill_loss_reference, distill_loss_torch
        from kimi_rl.kernels.distill_loss.triton_pass import distill_loss_triton
        # 9000: several blocks and a part of one; 4096: one whole; 300 and 41: less than one
        for vocabulary, temperature, weights in itertools.chain(
            itertools.product((300, 41), (1.0, 2.5), ((1.0, 0.0), (0.0, 1.0), (0.7, 0.3))),
            ((9000, 1.0, (0.7, 0.3)), (9000, 1.6, (0.7, 0.3)), (4096, 1.0, (1.0, 0.1)), (4097, 0.7, (1.0, 0.0))),
        ):
            tokens = 7 if vocabulary < 9000 else 3
            teacher = torch.randn(tokens, 20), torch.randn(vocabulary, 20)
            labels = torch.randint(vocabulary, (tokens,))
            labels[0], labels[1] = 0, vocabulary - 1
            options = dict(temperature=temperature, kl_weight=weights[0], ce_weight=weights[1])
            def of(form, inputs, **more):
                found = form(*inputs, *teacher, labels, **options, **more)
                grads = torch.autograd.grad(3 * found[0], inputs)
                return [x.detach() for x in found] + list(grads)
            inputs = [draw(tokens, 24), draw(vocabulary, 24)]
            ours, plain = of(distill_loss_triton, inputs, tile=3), of(distill_loss_reference, inputs)
            for a, b in zip(ours, plain, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
            rough = dict(matmul_dtype=torch.bfloat16)
            ours, plain = of(distill_loss_triton, inputs, tile=3, **rough), of(distill_loss_torch, inputs, **rough)
            for a, b in zip(ours, plain, strict=True):
                assert a.dtype == b.dtype == torch.float32
                assert float((a - b).norm()) <= 0.01 * float(b.norm())  # the interpreter cuts to bf16
            narrow = [x.detach().bfloat16().requires_grad_() for x in inputs]
            ours, plain = of(distill_loss_triton, narrow), of(distill_loss_torch, narrow)
            for a, b in zip(ours, plain, strict=True):
                assert a.dtype == b.dtype and float((a - b).norm()) <= 0.01 * float(b.norm())
        # Far apart: all of a softmax but one is 0. Two large logits that chance to lie near each other would make it
        # one that float32 itself does not know: of 1e5 it keeps 0.008.
        def far_apart(size):
            while True:
                hidden, weight = size * torch.randn(4, 8), torch.randn(50, 8)
                first, second = (hidden @ weight.T).topk(2).values.T
                if float((first - second).min()) > 30:
                    return hidden, weight
        large = [x.requires_grad_() for x in far_apart(1e4)]
        teacher, labels = far_apart(1e3), torch.zeros(4, dtype=torch.long)
        for a, b in zip(of(distill_loss_triton, large), of(distill_loss_reference, large), strict=True):
            assert bool(torch.isfinite(a).all())
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        half = [large[0], large[1].detach()]
        grads = [torch.autograd.grad(form(*half, *teacher, labels)[0], half[:1])[0]
                 for form in (distill_loss_triton, distill_loss_reference)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
        with torch.no_grad():  # the parts alone
            both = [form(*half, *teacher, labels) for form in (distill_loss_triton, distill_loss_reference)]
            for a, b in zip(*both, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    """,
    "relative_error": """
        from kimi_rl.kernels.relative_error import relative_error_reference, triton_error
        one = lambda form: lambda found, wanted: [form(found, wanted.detach())]
        ours, plain = one(triton_error.relative_error_triton), one(relative_error_reference)
        for triton_error.PROGRAMS in (1, 3, 1024):
            for shape in ((1, 7, 6), (1, 1000, 24), (3, 4096)):
                wanted = draw(*shape).detach()
                compare(ours, plain, [draw(*shape), wanted])
                compare(ours, plain, [draw(2, *shape).detach()[0].mT.requires_grad_(), wanted.mT], rtol=1e-4)
        narrow = [draw(1, 90, 24, dtype=torch.bfloat16), draw(1, 90, 24, dtype=torch.bfloat16).detach()]
        compare(ours, plain, narrow, rtol=0.01, atol=1e-5)  # the interpreter cuts to bf16
        compare(ours, plain, [narrow[0], narrow[1].float()], rtol=0.01, atol=1e-5)
    """,
    "model": """
        import random
        import re
        from kimi_rl.kernels import kda_gate, logprob, rms_norm, short_conv, swiglu
        from kimi_rl.model import modeling
        from test_packed_logps import batch, make_model, packed_scores
        random.seed(SEED)
        model, rows = make_model(), batch()

        def scores(autocast):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = packed_scores(model, *rows, "shared_prompt", tokens=150)  # several packs, run again
            logps = torch.cat([a for a, _ in found])
            loss = (logps * torch.linspace(-1, 1, len(logps))).sum() + sum(b.sum() for _, b in found)
            return [logps, *torch.autograd.grad(loss, list(model.parameters()))]

        plain = {autocast: scores(autocast) for autocast in (False, True)}
        seen, real = set(), modeling.choose
        def choose(kernel, tensor, **has):
            seen.add(kernel)
            return "fla"
        for module in (kda_gate, logprob, rms_norm, short_conv, swiglu, modeling):
            module.choose = choose
        ours = {autocast: scores(autocast) for autocast in (False, True)}
        for autocast in ours:
            assert [x.dtype for x in ours[autocast]] == [x.dtype for x in plain[autocast]]
        errors = [off(a, b) for a, b in zip(ours[False], plain[False], strict=True)]
        assert errors[0] < 1e-5 and max(errors) < 1e-4, errors
        # In bf16 all forms round. A gradient whose terms cancel (A_log of a layer: four numbers) can be far from
        # fp32 by chance, so the layers count together, and the yardstick is what rounding does to the plain forms.
        kinds = ["logps", *(re.sub(r"[.][0-9]+[.]", ".*.", name) for name, _ in model.named_parameters())]
        def of(kind, found):
            return torch.cat([x.float().flatten() for name, x in zip(kinds, found, strict=True) if name == kind])
        for kind in sorted(set(kinds)):
            exact = of(kind, plain[False])
            error, rounding = (off(of(kind, found[True]), exact) for found in (ours, plain))
            assert error <= 3 * rounding + (0.01 if kind == "logps" else 0.05), (kind, error, rounding)
        assert seen == {"kda_gate", "logprob", "rms_norm", "short_conv", "swiglu"}, seen
    """,
}


def test_triton_forms_in_the_interpreter(seed):
    """All in one process: most of the time is imports."""
    pytest.importorskip("triton")
    cases = {name: textwrap.dedent(case) for name, case in CASES.items()}
    code = PREAMBLE
    code += f"\nfor name, case in {cases!r}.items():\n    exec(case, dict(globals()))\n    print(name)"
    assert interpreted(code, seed).split() == list(CASES)
