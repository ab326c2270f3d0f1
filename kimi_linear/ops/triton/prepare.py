"""What a chunk can compute without the state: the decayed keys and queries, the attention inside, its inverse."""

import triton
import triton.language as tl

from kimi_linear.ops.triton.tiles import (
    LOG2E,
    double_segments,
    double_sub_chunks,
    level_exponent,
    level_mask,
    log2_decay,
    outer_exponent,
    place_chunk,
    sub_chunk_totals,
)


@triton.jit
def load_decay(
    g,
    base,
    offsets,
    mask,
    channels,
    channel_mask,
    hv,
    a_log,
    dt_bias,
    lower_bound,
    K: tl.constexpr,
    BK: tl.constexpr,
    GATE: tl.constexpr,
):
    """Base-2 log decay of a tile [A, S, D], 0 where there is no token or channel."""
    f = tl.load(tl.max_contiguous(g + base + offsets, (1, 1, max(1, BK // 32))), mask=mask, other=0.0).to(
        tl.float32
    )
    bias = 0.0
    rate = 1.0
    if dt_bias is not None:
        bias = tl.load(dt_bias + hv * K + channels, mask=channel_mask, other=0.0).to(tl.float32)[
            None, None, :
        ]
    if a_log is not None:
        rate = tl.exp2(tl.load(a_log + hv).to(tl.float32) * LOG2E)
    return tl.where(mask, log2_decay(f, bias, rate, lower_bound, GATE), 0.0)


@triton.jit
def load_beta(beta, base, offsets, mask, SIGMOID: tl.constexpr):
    x = tl.load(beta + base + offsets, mask=mask, other=0.0).to(tl.float32)
    if SIGMOID:
        x = 1.0 / (1.0 + tl.exp2(-x * LOG2E))
    return tl.where(mask, x, 0.0)


@triton.jit
def inverse_norm(x, base, token_stride: tl.constexpr, tokens, row_mask, K: tl.constexpr, BK: tl.constexpr):
    """1 / sqrt(sum x^2 + 1e-6) for every token of a tile [A, S]."""
    total = tl.zeros(tokens.shape, dtype=tl.float32)
    for start in tl.static_range(0, K, BK):
        channels = start + tl.arange(0, BK)
        mask = row_mask[:, :, None] & (channels < K)[None, None, :]
        offsets = tokens[:, :, None] * token_stride + channels[None, None, :]
        tile = tl.load(tl.max_contiguous(x + base + offsets, (1, 1, max(1, BK // 32))), mask=mask, other=0.0)
        tile = tile.to(tl.float32)
        total += tl.sum(tile * tile, axis=2)
    return tl.rsqrt(total + 1e-6)


@triton.jit
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
    gains,
    inverse,
    attention,
    chunk_table,
    cu_seqlens,
    T,
    sequences,
    scale,
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
    SOLVE_PRECISION: tl.constexpr,
):
    """One program a chunk and value head; G is the log decay summed from the chunk's start.

    Writes, in tile order, read_keys = beta k exp(G), queries = scale q exp(G), write_keys = k exp(G_C - G)
    [64, KP] each; decay = exp(G_C) [KP]; gains = beta [64]; attention = scale q k^T decayed, lower triangle, and
    inverse = (I + beta k k^T decayed, strictly lower)^-1, both [64, 64].
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
    tokens = s[None, :] * A + a[:, None]
    row_mask = tokens < rows
    if NORMALIZE:
        q_norm = inverse_norm(q, qk_base, H * K, tokens, row_mask, K, BK)
        k_norm = inverse_norm(k, qk_base, H * K, tokens, row_mask, K, BK)
    b = load_beta(beta, start * HV + hv, tokens * HV, row_mask, BETA_SIGMOID)
    tile_rows = a[:, None] * S + s[None, :]
    tl.store(gains + block * C + tile_rows, b)

    n = tl.arange(0, C)
    token = (n % S) * A + n // S
    sub_attention = tl.zeros([S, A, A], dtype=tl.float32)
    sub_gram = tl.zeros([S, A, A], dtype=tl.float32)
    far_attention = tl.zeros([C, C], dtype=tl.float32)
    far_gram = tl.zeros([C, C], dtype=tl.float32)
    diagonal = tl.zeros([A, S], dtype=tl.float32)
    for k_start in tl.range(0, KP, BK):
        channels = k_start + tl.arange(0, BK)
        channel_mask = channels < K
        mask = row_mask[:, :, None] & channel_mask[None, None, :]
        offsets = tokens[:, :, None] * (H * K) + channels[None, None, :]
        q_tile = tl.load(
            tl.max_contiguous(q + qk_base + offsets, (1, 1, max(1, BK // 32))), mask=mask, other=0.0
        ).to(tl.float32)
        k_tile = tl.load(
            tl.max_contiguous(k + qk_base + offsets, (1, 1, max(1, BK // 32))), mask=mask, other=0.0
        ).to(tl.float32)
        if NORMALIZE:
            q_tile *= q_norm[:, :, None]
            k_tile *= k_norm[:, :, None]
        diagonal += tl.sum(q_tile * k_tile, axis=2)
        g_offsets = tokens[:, :, None] * (HV * K) + channels[None, None, :]
        before = load_decay(
            g, g_base, g_offsets, mask, channels, channel_mask, hv, a_log, dt_bias, lower_bound, K, BK, GATE
        )
        after = tl.zeros_like(before)
        for level in tl.static_range(4):
            d = tl.exp2(level_exponent(before, after, 1 << level, A, S, BK))
            k_decayed = tl.permute((k_tile * d).to(OPERAND), (1, 0, 2))
            q_decayed = tl.permute((q_tile * d).to(OPERAND), (1, 0, 2))
            k_columns = tl.permute(k_decayed, (0, 2, 1))
            inside = level_mask(a[:, None], a[None, :], 1 << level)[None, :, :]
            sub_attention += tl.where(inside, tl.dot(q_decayed, k_columns, input_precision=PRECISION), 0.0)
            sub_gram += tl.where(inside, tl.dot(k_decayed, k_columns, input_precision=PRECISION), 0.0)
            before, after = double_segments(before, after, 1 << level, A, S, BK)
        totals = sub_chunk_totals(before, A)
        offset_before = tl.zeros_like(totals)
        offset_after = tl.zeros_like(totals)
        for level in tl.static_range(2):
            d = tl.exp2(outer_exponent(before, after, offset_before, offset_after, 1 << level, S))
            k_decayed = tl.reshape((k_tile * d).to(OPERAND), [C, BK])
            q_decayed = tl.reshape((q_tile * d).to(OPERAND), [C, BK])
            inside = level_mask(token[:, None], token[None, :], A << level)
            far_attention += tl.where(
                inside, tl.dot(q_decayed, tl.trans(k_decayed), input_precision=PRECISION), 0.0
            )
            far_gram += tl.where(
                inside, tl.dot(k_decayed, tl.trans(k_decayed), input_precision=PRECISION), 0.0
            )
            offset_before, offset_after = double_sub_chunks(
                offset_before, offset_after, totals, 1 << level, S, BK
            )

        out = block * (C * KP) + tile_rows[:, :, None] * KP + channels[None, None, :]
        decayed = tl.exp2(before + offset_before)
        tl.store(
            tl.max_contiguous(queries + out, (1, 1, max(1, BK // 32))), (q_tile * decayed * scale).to(OPERAND)
        )
        tl.store(
            tl.max_contiguous(read_keys + out, (1, 1, max(1, BK // 32))),
            (k_tile * decayed * b[:, :, None]).to(OPERAND),
        )
        tl.store(
            tl.max_contiguous(write_keys + out, (1, 1, max(1, BK // 32))),
            (k_tile * tl.exp2(after + offset_after)).to(OPERAND),
        )
        whole = tl.sum(totals, axis=1, keep_dims=True)
        channel_offsets = channels[None, None, :] + tl.zeros([1, 1, 1], dtype=tl.int32)
        tl.store(decay + block * KP + channel_offsets, tl.exp2(whole))

    # (I + L)^-1 by blocks: [[X, 0], [L', Y]] has the inverse [[X^-1, 0], [-Y^-1 L' X^-1, Y^-1]]. Every product is
    # of true inverses, so near-collinear keys, which make the powers of L explode, do no harm.
    same = a[None, :, None] == a[None, None, :]
    sub_gram *= tl.permute(b, (1, 0))[:, :, None]
    inv = tl.where(same, 1.0, 0.0) - tl.where(
        level_mask(a[:, None], a[None, :], 1)[None, :, :], sub_gram, 0.0
    )
    for level in tl.static_range(1, 4):
        part = tl.where(level_mask(a[:, None], a[None, :], 1 << level)[None, :, :], sub_gram, 0.0)
        part = tl.dot(part, inv, input_precision=SOLVE_PRECISION)
        inv -= tl.dot(inv, part, input_precision=SOLVE_PRECISION)
    same_sub_chunk = s[None, :, None, None] == s[None, None, None, :]
    inv = tl.where(same_sub_chunk, tl.permute(inv, (1, 0, 2))[:, :, :, None], 0.0)
    inv = tl.reshape(inv, [C, C])
    far_gram *= tl.reshape(b, [C])[:, None]
    for level in tl.static_range(2):
        part = tl.where(level_mask(token[:, None], token[None, :], A << level), far_gram, 0.0)
        part = tl.dot(part, inv, input_precision=SOLVE_PRECISION)
        inv -= tl.dot(inv, part, input_precision=SOLVE_PRECISION)

    sub_attention += tl.where(same, tl.permute(diagonal, (1, 0))[:, :, None], 0.0)
    near = tl.where(same_sub_chunk, tl.permute(sub_attention, (1, 0, 2))[:, :, :, None], 0.0)
    full_attention = (far_attention + tl.reshape(near, [C, C])) * scale
    out = block * (C * C) + n[:, None] * C + n[None, :]
    tl.store(attention + out, full_attention.to(OPERAND))
    tl.store(inverse + out, inv.to(OPERAND))
