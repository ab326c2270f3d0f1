"""What a chunk can compute without the state, so that the scan is left with four products a chunk."""

import triton
import triton.language as tl

from kimi_linear.ops.triton.tiles import (
    LOG2E,
    SIZES,
    double_segments,
    double_sub_chunks,
    level_decay,
    level_mask,
    load_tile,
    log2_decay,
    multiply,
    outer_decay,
    place_chunk,
    store_tile,
    sub_chunk_totals,
)


@triton.jit
def load_raw_gate(
    g,
    rows,
    start,
    hv,
    dt_bias,
    stride: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
):
    """The gate's argument f + dt_bias [A, S, D]."""
    f = load_tile(g, stride, rows, start, K, S, A, D).to(tl.float32)
    if dt_bias is not None:
        channels = start + tl.arange(0, D)
        f += tl.load(dt_bias + hv * K + channels, mask=channels < K, other=0.0).to(tl.float32)[None, None, :]
    return f


@triton.jit
def inside_tile(rows, start, K: tl.constexpr, S: tl.constexpr, A: tl.constexpr, D: tl.constexpr):
    """True where a tile [A, S, D] has a token and a channel."""
    token = tl.arange(0, S)[None, :] * A + tl.arange(0, A)[:, None]
    return (token < rows)[:, :, None] & (start + tl.arange(0, D) < K)[None, None, :]


@triton.jit
def load_beta(beta, base, offsets, mask, SIGMOID: tl.constexpr):
    x = tl.load(beta + base + offsets, mask=mask, other=0.0).to(tl.float32)
    if SIGMOID:  # noqa: SIM108
        x = 1.0 / (1.0 + tl.exp2(-x * LOG2E))
    else:
        # The gradient divides by beta.
        x = tl.where(x == 0.0, 1e-30, x)
    return tl.where(mask, x, 0.0)


@triton.jit
def product(x, y, PRECISION: tl.constexpr):
    """[G, M, D] @ [G, D, N]. A batch of one goes as matrices, or every warp would compute all of it."""
    G: tl.constexpr = x.shape[0]
    M: tl.constexpr = x.shape[1]
    D: tl.constexpr = x.shape[2]
    N: tl.constexpr = y.shape[2]
    if G == 1:
        z = tl.dot(tl.reshape(x, [M, D]), tl.reshape(y, [D, N]), input_precision=PRECISION)
        z = tl.reshape(z, [1, M, N])
    else:
        z = tl.dot(x, y, input_precision=PRECISION)
    return z


@triton.jit
def halves(x, GROUPS: tl.constexpr, H: tl.constexpr):
    """Even and odd groups of H rows, [GROUPS, H, D] each, of x [2 * GROUPS * H rows, D]."""
    D: tl.constexpr = x.shape[-1]
    return tl.split(tl.permute(tl.reshape(x, [GROUPS, 2, H, D]), (0, 2, 3, 1)))


@triton.jit
def stack_rows(x, y):
    """[G, H, D] over [G, H, D]: [G, 2 H, D]."""
    G: tl.constexpr = x.shape[0]
    H: tl.constexpr = x.shape[1]
    D: tl.constexpr = x.shape[2]
    return tl.reshape(tl.permute(tl.join(x, y), (0, 3, 1, 2)), [G, 2 * H, D])


@triton.jit
def stack_columns(x, y):
    """[G, H, D] beside [G, H, D]: [G, H, 2 D]."""
    G: tl.constexpr = x.shape[0]
    H: tl.constexpr = x.shape[1]
    D: tl.constexpr = x.shape[2]
    return tl.reshape(tl.permute(tl.join(x, y), (0, 1, 3, 2)), [G, H, 2 * D])


@triton.jit
def load_row_scales(scales, block, tokens, C: tl.constexpr):
    """Inverse norms of q and k, and beta, of a tile of tokens, as `prepare_kernel` left them."""
    at = scales + block * (3 * C) + tokens
    return tl.load(at), tl.load(at + C), tl.load(at + 2 * C)


@triton.jit
def assemble(near, mid, far):
    """A lower triangular matrix [64, 64] from its blocks: [4, 16, 16] on the diagonal, [2, 16, 16] between
    neighbours and [1, 32, 32] between the halves.
    """
    first, second = halves(near, 2, 16)
    zeros = tl.zeros_like(mid)
    near = stack_rows(stack_columns(first, zeros), stack_columns(mid, second))
    first, second = halves(near, 1, 32)
    return tl.reshape(
        stack_rows(stack_columns(first, tl.zeros_like(far)), stack_columns(far, second)), [64, 64]
    )


@triton.jit
def load_decays(
    g,
    rows,
    start,
    hv,
    dt_bias,
    rate,
    lower_bound,
    HV: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    GATE: tl.constexpr,
):
    """Every token's own decay [A, S, D]; 1 where there is no token or channel."""
    f = load_raw_gate(g, rows, start, hv, dt_bias, HV * K, K, S, A, D)
    d = tl.exp2(log2_decay(f, 0.0, rate, lower_bound, GATE))
    return tl.where(inside_tile(rows, start, K, S, A, D), d, 1.0)


@triton.jit(do_not_specialize=SIZES)
def prepare_kernel(
    q,
    k,
    g,
    beta,
    a_log,
    dt_bias,
    read_keys,
    queries,
    write_keys,
    decay,
    scales,
    inverse,
    inverse_rest,
    write_rest,
    attention,
    chunk_table,
    cu_seqlens,
    T,
    sequences,
    lower_bound,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BK: tl.constexpr,
    VARLEN: tl.constexpr,
    GATE: tl.constexpr,
    BETA_SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One program a chunk and value head; G is the log decay summed from the chunk's start.

    With P = q k^T decayed, lower triangle, and
    inverse = diag(rk) (I + diag(beta rk) (k k^T decayed, strictly lower) diag(rk))^-1, both [64, 64], writes

    read_keys = k exp(G), queries = q exp(G), write_keys = inverse^T k exp(G_C - G), [64, KP] each;
    attention = diag(rq) P inverse [64, 64]; decay = exp(G_C) [KP]; and scales [3, 64]: rq and rk, the inverse
    norms (1 unless NORMALIZE), and beta. Only where they are given, for gradients: `inverse` itself, and what
    it and write_keys lose when they are rounded to OPERAND (`inverse_rest`, `write_rest`).

    The scans see nothing else of the inverse. Between keys that are nearly the same it takes differences, so
    here everything up to its products is multiplied in more than OPERAND's precision, and rounded last.
    queries and read_keys are without their norms, which are sums over all channels, known at the end, and
    cost the scans one product a row.
    """
    A: tl.constexpr = 16
    S: tl.constexpr = 4
    C: tl.constexpr = A * S
    program = tl.program_id(0)
    chunk = program // HV
    hv = program % HV
    start, rows = place_chunk(chunk, chunk_table, cu_seqlens, T, sequences, VARLEN, C)
    if rows <= 0:
        return
    qk_base = (start * H + hv // (HV // H)) * K
    g_base = (start * HV + hv) * K
    block = program.to(tl.int64)

    a = tl.arange(0, A)
    s = tl.arange(0, S)
    rate = 1.0
    if a_log is not None:
        rate = tl.exp2(tl.load(a_log + hv).to(tl.float32) * LOG2E)
    same = a[None, :, None] == a[None, None, :]
    # Rows and columns of one sub-chunk, of two neighbours, and of the chunk's two halves.
    near_attention = tl.zeros([S, A, A], dtype=tl.float32)
    near_gram = tl.zeros([S, A, A], dtype=tl.float32)
    q_gram = tl.zeros([S, A, A], dtype=tl.float32)
    mid_attention = tl.zeros([S // 2, A, A], dtype=tl.float32)
    mid_gram = tl.zeros([S // 2, A, A], dtype=tl.float32)
    far_attention = tl.zeros([1, 2 * A, 2 * A], dtype=tl.float32)
    far_gram = tl.zeros([1, 2 * A, 2 * A], dtype=tl.float32)
    out = block * (C * KP)
    for k_start in tl.range(0, KP, BK):
        q_tile = load_tile(q + qk_base, H * K, rows, k_start, K, S, A, BK).to(tl.float32)
        k_tile = load_tile(k + qk_base, H * K, rows, k_start, K, S, A, BK).to(tl.float32)
        q_rows = tl.permute(q_tile, (1, 0, 2))
        k_rows = tl.permute(k_tile, (1, 0, 2))
        k_columns = tl.permute(k_rows, (0, 2, 1))
        # The diagonals: q . k, which no decay touches, and the squared norms.
        near_attention += tl.where(same, tl.dot(q_rows, k_columns, input_precision=PRECISION), 0.0)
        if NORMALIZE:
            near_gram += tl.where(same, tl.dot(k_rows, k_columns, input_precision=PRECISION), 0.0)
            q_gram = tl.dot(q_rows, tl.permute(q_rows, (0, 2, 1)), acc=q_gram, input_precision=PRECISION)
        before = load_decays(g + g_base, rows, k_start, hv, dt_bias, rate, lower_bound, HV, K, S, A, BK, GATE)
        after = tl.full([A, S, BK], 1.0, dtype=tl.float32)
        for level in tl.static_range(4):
            d = level_decay(before, after, 1 << level, A, S, BK)
            k_rows = tl.permute(k_tile * d, (1, 0, 2))
            q_rows = tl.permute(q_tile * d, (1, 0, 2))
            k_columns = tl.permute(k_rows, (0, 2, 1))
            inside = level_mask(a[:, None], a[None, :], 1 << level)[None, :, :]
            near_attention += tl.where(inside, tl.dot(q_rows, k_columns, input_precision=PRECISION), 0.0)
            near_gram += tl.where(inside, tl.dot(k_rows, k_columns, input_precision=PRECISION), 0.0)
            before, after = double_segments(before, after, 1 << level, A, S, BK)

        totals = sub_chunk_totals(before, A)
        offset_before = tl.full([1, S, BK], 1.0, dtype=tl.float32)
        offset_after = tl.full([1, S, BK], 1.0, dtype=tl.float32)
        d = outer_decay(before, after, offset_before, offset_after, 1, S)
        k_columns, k_rows = halves(tl.permute(k_tile * d, (1, 0, 2)), 2, A)
        _q_columns, q_rows = halves(tl.permute(q_tile * d, (1, 0, 2)), 2, A)
        k_columns = tl.permute(k_columns, (0, 2, 1))
        mid_attention = tl.dot(q_rows, k_columns, acc=mid_attention, input_precision=PRECISION)
        mid_gram = tl.dot(k_rows, k_columns, acc=mid_gram, input_precision=PRECISION)
        offset_before, offset_after = double_sub_chunks(offset_before, offset_after, totals, 1, S, BK)
        d = outer_decay(before, after, offset_before, offset_after, 2, S)
        k_columns, k_rows = halves(tl.permute(k_tile * d, (1, 0, 2)), 1, 2 * A)
        _q_columns, q_rows = halves(tl.permute(q_tile * d, (1, 0, 2)), 1, 2 * A)
        k_columns = tl.permute(k_columns, (0, 2, 1))
        far_attention += product(q_rows, k_columns, PRECISION)
        far_gram += product(k_rows, k_columns, PRECISION)
        offset_before, offset_after = double_sub_chunks(offset_before, offset_after, totals, 2, S, BK)

        d = before * offset_before
        store_tile(queries + out, q_tile * d, KP, C, k_start, KP, S, A, BK)
        store_tile(read_keys + out, k_tile * d, KP, C, k_start, KP, S, A, BK)
        whole = tl.expand_dims(tl.reduce(totals, 1, multiply), 1)
        channel_offsets = k_start + tl.arange(0, BK)[None, None, :] + tl.zeros([1, 1, 1], dtype=tl.int32)
        tl.store(decay + block * KP + channel_offsets, whole)

    near_token = s[:, None] * A + a[None, :]
    b = load_beta(beta, start * HV + hv, near_token * HV, near_token < rows, BETA_SIGMOID)
    k_norm = tl.full([S, A], 1.0, dtype=tl.float32)
    q_norm = tl.full([S, A], 1.0, dtype=tl.float32)
    if NORMALIZE:
        k_norm = tl.rsqrt(tl.sum(tl.where(same, near_gram, 0.0), axis=2) + 1e-6)
        q_norm = tl.rsqrt(tl.sum(tl.where(same, q_gram, 0.0), axis=2) + 1e-6)
    at = scales + block * (3 * C) + near_token
    tl.store(at, q_norm)
    tl.store(at + C, k_norm)
    tl.store(at + 2 * C, b)
    tl.debug_barrier()

    # (I + L)^-1 by blocks: [[X, 0], [L', Y]] has the inverse [[X^-1, 0], [-Y^-1 L' X^-1, Y^-1]]. Every
    # product is of true inverses, so near-collinear keys, which make the powers of L explode, do no harm.
    near_gram *= (b * k_norm)[:, :, None] * k_norm[:, None, :]
    near = tl.where(level_mask(a[:, None], a[None, :], 1)[None, :, :], -near_gram, 0.0)
    near = tl.where(same, 1.0, near)
    for level in tl.static_range(1, 4):
        part = tl.where(level_mask(a[:, None], a[None, :], 1 << level)[None, :, :], near_gram, 0.0)
        part = tl.dot(part, near, input_precision=EXACT)
        near -= tl.dot(near, part, input_precision=EXACT)
    first, second = halves(near, 2, A)
    token = tl.arange(0, 2)[:, None] * (2 * A) + a[None, :]
    _, column_norm, _ = load_row_scales(scales, block, token, C)
    _, row_norm, row_b = load_row_scales(scales, block, token + A, C)
    mid_gram *= (row_norm * row_b)[:, :, None] * column_norm[:, None, :]
    mid = tl.dot(mid_gram, first, input_precision=EXACT)
    mid = -tl.dot(second, mid, input_precision=EXACT)
    blocks = stack_rows(stack_columns(first, tl.zeros_like(first)), stack_columns(mid, second))
    first, second = halves(blocks, 1, 2 * A)
    token = tl.arange(0, 2 * A)[None, :]
    _, column_norm, _ = load_row_scales(scales, block, token, C)
    _, row_norm, row_b = load_row_scales(scales, block, token + 2 * A, C)
    far_gram *= (row_norm * row_b)[:, :, None] * column_norm[:, None, :]
    far = product(far_gram, first, EXACT)
    far = -product(second, far, EXACT)

    solve = assemble(near, mid, far)
    n = tl.arange(0, C)
    row_q_norm, row_norm, _ = load_row_scales(scales, block, n, C)
    solve *= row_norm[:, None]
    at = block * (C * C) + n[:, None] * C + n[None, :]
    if inverse is not None:
        tl.store(inverse + at, solve.to(OPERAND))
    if inverse_rest is not None:
        tl.store(inverse_rest + at, (solve - solve.to(OPERAND).to(tl.float32)).to(OPERAND))
    scores = tl.dot(assemble(near_attention, mid_attention, far_attention), solve, input_precision=EXACT)
    scores *= row_q_norm[:, None]
    tl.store(attention + at, scores.to(OPERAND))

    solve = tl.trans(solve)
    for k_start in tl.range(0, KP, BK):
        k_tile = load_tile(k + qk_base, H * K, rows, k_start, K, S, A, BK).to(tl.float32)
        before = load_decays(g + g_base, rows, k_start, hv, dt_bias, rate, lower_bound, HV, K, S, A, BK, GATE)
        after = tl.full([A, S, BK], 1.0, dtype=tl.float32)
        for level in tl.static_range(4):
            before, after = double_segments(before, after, 1 << level, A, S, BK)
        totals = sub_chunk_totals(before, A)
        offset_before = tl.full([1, S, BK], 1.0, dtype=tl.float32)
        offset_after = tl.full([1, S, BK], 1.0, dtype=tl.float32)
        for level in tl.static_range(2):
            offset_before, offset_after = double_sub_chunks(
                offset_before, offset_after, totals, 1 << level, S, BK
            )
        writes = tl.reshape(tl.permute(k_tile * (after * offset_after), (1, 0, 2)), [C, BK])
        writes = tl.dot(solve, writes, input_precision=EXACT)
        write_at = out + n[:, None] * KP + k_start + tl.arange(0, BK)[None, :]
        rounded = writes.to(OPERAND)
        tl.store(write_keys + write_at, rounded)
        if write_rest is not None:
            tl.store(write_rest + write_at, (writes - rounded.to(tl.float32)).to(OPERAND))
