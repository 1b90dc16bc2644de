"""KDA in chunks, in plain PyTorch: the CPU's training and prefill form.

Within a chunk of C tokens, with P_i the sum of g over the chunk's tokens up to and including i:

    A[i, j]   = beta_i <k_i exp(P_i - P_j), k_j>    for j < i
    Aqk[i, j] = <q_i exp(P_i - P_j), k_j>           for j <= i
    [U | W]   = (I + A)^-1 [beta v | beta k exp(P)]
    v' = U - W S;   o = (q exp(P)) S + Aqk v';   S <- Diag(exp(P_C)) S + (k exp(P_C - P))^T v'

exp(P_i - P_j) must not be split into exp(P_i) exp(-P_j): the second factor overflows for strong decay. It is
also unwise to subtract P's: at g = -50 a token P reaches -3200, where float32 has lost the fourth decimal. So
both matrices are built by doubling. Two neighbouring blocks L and R of s tokens meet at the border between
them, and for i in R and j in L

    P_i - P_j = (sum of g from the border to i) + (sum of g after j to the border),

two sums that are each at most 0, so their exponentials are at most 1 and the pair block is one matrix
product. Sums inside a block of 2s follow from those inside blocks of s by adding the total of one half. No
difference is ever taken, nothing overflows, every exponent has full relative precision, and log2(C) products
replace the C x C x K tensor (or the loop over rows) of other PyTorch forms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kimi_rl.kernels.dispatch import compute_dtype, sequence_bounds
from kimi_rl.kernels.kda_chunk.reference import l2norm


@dataclass(frozen=True)
class _Layout:
    """Where tokens lie in chunks.

    Chunks are sorted by their place in the sequence, then by sequence, longest first: the sequences that have
    a j-th chunk are a leading slice of all, and step j works on one contiguous range.
    """

    chunk: int
    per_step: list[int]  # number of sequences that have a j-th chunk
    shape: tuple[int, int]  # (B, T) of the input
    order: list[int] | None = None  # packed only: sequences, longest first
    token_of_slot: torch.Tensor | None = None  # packed only: [M * C], T where the slot is padding
    slot_of_token: torch.Tensor | None = None  # packed only: [T]

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, H, D] -> [M, H, C, D], zeros in padding."""
        batch, length = self.shape
        if self.token_of_slot is None:
            steps = len(self.per_step)
            if steps * self.chunk != length:
                x = F.pad(x, (0, 0, 0, 0, 0, steps * self.chunk - length))
            x = x.unflatten(1, (steps, self.chunk)).permute(1, 0, 3, 2, 4)
            return x.reshape(steps * batch, *x.shape[2:])
        x = F.pad(x[0], (0, 0, 0, 0, 0, 1)).index_select(0, self.token_of_slot)
        return x.unflatten(0, (-1, self.chunk)).transpose(1, 2).contiguous()

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """[M, H, C, D] -> [B, T, H, D]."""
        batch, length = self.shape
        if self.slot_of_token is None:
            x = x.unflatten(0, (len(self.per_step), batch)).permute(1, 0, 3, 2, 4)
            return x.reshape(batch, -1, *x.shape[3:])[:, :length]
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.slot_of_token).unsqueeze(0)


def _layout(batch: int, length: int, cu_seqlens: torch.Tensor | None, chunk_size: int, device) -> _Layout:
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two, found {chunk_size}")
    if cu_seqlens is None:
        chunk = _chunk_for(length, chunk_size)
        return _Layout(chunk, [batch] * -(-length // chunk), (batch, length))
    bounds = sequence_bounds(cu_seqlens, batch, length)
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    chunk = _chunk_for(max(lengths), chunk_size)
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    per_step, starts, ends = [], [], []
    for j in range(-(-max(lengths) // chunk)):
        alive = [n for n in order if lengths[n] > j * chunk]
        per_step.append(len(alive))
        starts += [bounds[n] + j * chunk for n in alive]
        ends += [bounds[n + 1] for n in alive]
    tokens = torch.tensor(starts)[:, None] + torch.arange(chunk)
    tokens = torch.where(tokens < torch.tensor(ends)[:, None], tokens, length).flatten()
    slots = torch.empty(length + 1, dtype=torch.long)
    slots[tokens] = torch.arange(tokens.numel())
    return _Layout(chunk, per_step, (1, length), order, tokens.to(device), slots[:length].to(device))


def _chunk_for(longest: int, largest: int) -> int:
    """The chunk size for sequences of at most `longest` tokens: a power of two, at most `largest`.

    16 up to 128 tokens (less padding), else 32: the fastest sizes on a CPU. More only makes the triangular
    solve grow.
    """
    preferred = 16 if longest <= 128 else 32
    chunk = 1
    while chunk < min(longest, largest, preferred):
        chunk *= 2
    return chunk


def _intra_chunk(q, k, g):
    """Decayed products inside chunks, by doubling (see the top of the file).

    q, k, g [M, H, C, K]. Returns kk [M, H, C, C] (strictly lower triangular), qk [M, H, C, C] (lower
    triangular with its diagonal), prefix [M, H, C, K] (sum of g up to and including a token) and suffix (sum
    of g after a token).
    """
    # Per block of s tokens: rows are [q; k] stacked, so one product serves both matrices.
    blocks = torch.stack([q, k], dim=2)  # [M, H, 2, C, K]
    qk_diagonal = (q * k).sum(-1)[..., None, None]  # [M, H, C, 1, 1], the blocks of one token
    matrix = torch.stack([qk_diagonal, torch.zeros_like(qk_diagonal)], dim=2)  # [M, H, 2, blocks, s, s]
    prefix, suffix = g, torch.zeros_like(g)
    size, chunk = 1, q.shape[-2]
    while size < chunk:
        pairs = chunk // (2 * size)
        split = (pairs, 2, size)
        p, s = prefix.unflatten(-2, split), suffix.unflatten(-2, split)  # [M, H, pairs, 2, size, K]
        columns = k.unflatten(-2, split)[..., 0, :, :] * s[..., 0, :, :].exp()  # left halves
        rows = blocks.unflatten(-2, split)[..., 1, :, :] * p[..., 1, :, :].exp().unsqueeze(2)  # right halves
        corner = rows @ columns.transpose(-1, -2).unsqueeze(2)  # [M, H, 2, pairs, size, size]
        left, right = matrix.unflatten(-3, (pairs, 2)).unbind(-3)
        upper = torch.cat([left, torch.zeros_like(left)], dim=-1)
        matrix = torch.cat([upper, torch.cat([corner, right], dim=-1)], dim=-2)
        total_left, total_right = p[..., 0, -1:, :], p[..., 1, -1:, :]
        prefix = torch.stack([p[..., 0, :, :], p[..., 1, :, :] + total_left], dim=-3).flatten(-4, -2)
        suffix = torch.stack([s[..., 0, :, :] + total_right, s[..., 1, :, :]], dim=-3).flatten(-4, -2)
        size *= 2
    qk, kk = matrix.squeeze(3).unbind(2)
    return kk, qk, prefix, suffix


def kda_chunk_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm: bool = True,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Same signature and shapes as `kda_chunk`. Any device; computed in float32 or float64."""
    out_dtype, dtype = v.dtype, compute_dtype(q, k, v, g, beta)
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    if use_qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    layout = _layout(*k.shape[:2], cu_seqlens, chunk_size, k.device)
    heads, key_dim, value_dim = k.shape[2], k.shape[3], v.shape[3]
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1

    q, k, v, g, beta = (layout.split(x) for x in (q, k, v, g, beta.unsqueeze(-1)))
    kk, qk, prefix, suffix = _intra_chunk(q, k, g)
    decay = prefix.exp()
    right_side = torch.cat([beta * v, beta * k * decay], dim=-1)
    # `unitriangular` reads neither the diagonal (as 1) nor the upper triangle: this is (I + A)^-1 [...].
    solved = torch.linalg.solve_triangular(beta * kk, right_side, upper=False, unitriangular=True)
    U, W = solved.split([value_dim, key_dim], dim=-1)
    k_to_end = (k * suffix.exp()).transpose(-1, -2)
    chunk_decay = decay[..., -1, :, None]  # [M, H, K, 1]

    if initial_state is None:
        state = k.new_zeros(sequences, heads, key_dim, value_dim)
    else:
        state = initial_state.to(dtype)
        if layout.order is not None:
            state = state[layout.order]
    entering, corrected, leaving = [], [], []
    done = 0
    for alive in layout.per_step:
        leaving.append(state[alive:])  # sequences that ended one chunk ago
        state = state[:alive]
        now = slice(done, done + alive)
        entering.append(state)
        corrected.append(U[now] - W[now] @ state)
        state = state * chunk_decay[now] + k_to_end[now] @ corrected[-1]
        done += alive
    o = (q * decay) @ torch.cat(entering) + qk @ torch.cat(corrected)

    if not output_final_state:
        return layout.join(o).to(out_dtype), None
    # The shortest sequences left first: this is the order of `layout.order` again.
    final = torch.cat([state, *leaving[::-1]])
    if layout.order is not None:
        back = [0] * sequences
        for place, n in enumerate(layout.order):
            back[n] = place
        final = final[back]
    return layout.join(o).to(out_dtype), final
