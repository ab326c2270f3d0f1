"""Device functions shared by the chunk kernels: the order of a tile's rows, the gate, the segmented decays.

A chunk holds 64 tokens. Its tile is laid out as [A, S, D], token = s * A + a, so that with S warps and one
warp per row the A tokens of a sub-chunk sit in one thread's registers: scans along them cost no exchange
between threads. Memory is always in the order of the tokens.

Decays between two tokens of a chunk, exp(G_i - G_j) for i > j, are never split around an anchor that could
overflow. Level h of a binary tree pairs the second half (rows) of each segment of 2h tokens with its first
half (columns); a row decays from the middle of the segment to i, a column from j to the middle. Both are
products of the tokens' own decays, so at most 1, and neither looks at a token later than i. Products of
decays, unlike sums of their logarithms, keep their relative precision and need one exponential a token.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

NO_GATE = tl.constexpr(0)
SOFTPLUS_GATE = tl.constexpr(1)
BOUNDED_GATE = tl.constexpr(2)

# Arguments whose values no kernel is compiled for. Besides new compilations, a length of 1 would bring loops
# of one step, which the compiler dissolves, and with them the pipelining that warp-group products need: those
# of Triton 3.6 read past their operands without it.
SIZES = ("T", "sequences", "slices")

# Of two dimensions contiguous alike, warps go to the outer one before Triton 3.7, to the inner one since: the
# order of the two in memory-side tiles that leaves sub-chunks to warps and their tokens to registers.
SUB_CHUNKS_OUTERMOST = tl.constexpr(tuple(int(x) for x in triton.__version__.split(".")[:2]) < (3, 7))


@triton.jit
def place_chunk(chunk, chunk_table, cu_seqlens, T, sequences, VARLEN: tl.constexpr, C: tl.constexpr):
    """Where chunk number `chunk` lies: its first token in the flattened batch and its number of tokens.

    The number is 0 for chunks that a packed batch does not use.
    """
    if VARLEN:
        sequence = tl.load(chunk_table + 2 * chunk)
        index = tl.load(chunk_table + 2 * chunk + 1)
        inside = sequence < sequences
        end = tl.load(cu_seqlens + sequence + 1, mask=inside, other=0).to(tl.int64)
        start = tl.load(cu_seqlens + sequence, mask=inside, other=0).to(tl.int64) + index * C
        rows = tl.where(inside, tl.minimum(end - start, C), 0).to(tl.int32)
    else:
        chunks = tl.cdiv(T, C)
        index = chunk % chunks
        start = (chunk // chunks).to(tl.int64) * T + index * C
        rows = tl.minimum(T - index * C, C)
    return start, rows


@triton.jit
def tile_offsets(stride: tl.constexpr, start, S: tl.constexpr, A: tl.constexpr, D: tl.constexpr):
    """Offsets of channels `start` to start + D of a chunk's tokens, `stride` elements apart.

    They have 64 bits from the start: then a token's place in its sub-chunk is a constant in each address,
    which the load itself adds. Widened later, every row would hold its own address in registers, for every
    tensor.
    """
    a = tl.arange(0, A).to(tl.int64) * stride
    s = tl.arange(0, S).to(tl.int64) * (A * stride)
    channels = (start + tl.arange(0, D)).to(tl.int64)
    if SUB_CHUNKS_OUTERMOST:
        offsets = s[:, None, None] + a[None, :, None] + channels[None, None, :]
    else:
        offsets = s[None, :, None] + a[:, None, None] + channels[None, None, :]
    return offsets


@triton.jit
def tile_mask(rows, start, K: tl.constexpr, S: tl.constexpr, A: tl.constexpr, D: tl.constexpr):
    """True where a tile has a token and a channel; in the same order as the addresses."""
    a = tl.arange(0, A)
    s = tl.arange(0, S) * A
    channels = (start + tl.arange(0, D) < K)[None, None, :]
    if SUB_CHUNKS_OUTERMOST:
        mask = (s[:, None, None] + a[None, :, None] < rows) & channels
    else:
        mask = (s[None, :, None] + a[:, None, None] < rows) & channels
    return mask


@triton.jit
def load_tile(
    base,
    stride: tl.constexpr,
    rows,
    start,
    K: tl.constexpr,
    S: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
):
    """A tile [A, S, D] with a warp's 32 lanes along a row; zeros where there is no token or channel."""
    offsets = tile_offsets(stride, start, S, A, D)
    # Claiming no more alignment than this keeps a lane from taking 16 bytes, which would spread a sub-chunk
    # over lanes.
    at = tl.multiple_of(
        base + offsets, (1, 1, max(1, D // 32) * (base.dtype.element_ty.primitive_bitwidth // 8))
    )
    x = tl.load(at, mask=tile_mask(rows, start, K, S, A, D), other=0.0)
    if SUB_CHUNKS_OUTERMOST:
        x = tl.permute(x, (1, 0, 2))
    return x


@triton.jit
def store_tile(
    base,
    x,
    stride: tl.constexpr,
    rows,
    start,
    K: tl.constexpr,
    S: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
):
    """The counterpart of `load_tile`."""
    offsets = tile_offsets(stride, start, S, A, D)
    at = tl.multiple_of(
        base + offsets, (1, 1, max(1, D // 32) * (base.dtype.element_ty.primitive_bitwidth // 8))
    )
    x = x.to(base.dtype.element_ty)
    if SUB_CHUNKS_OUTERMOST:
        x = tl.permute(x, (1, 0, 2))
    tl.store(at, x, mask=tile_mask(rows, start, K, S, A, D))


@triton.jit
def log2_decay(f, bias, rate, lower_bound, GATE: tl.constexpr):
    """Base-2 log decay from the raw gate; rate is exp(A_log)."""
    if GATE == NO_GATE:
        g = f * LOG2E
    elif GATE == SOFTPLUS_GATE:
        x = f + bias
        e = tl.exp2(-tl.abs(x) * LOG2E)
        # log2(1 + e) = e p(e), p fitted on [0, 1] to a relative error of 2e-7. Rounding 1 + e first would
        # lose small values of e, which a long memory adds up.
        p = -0.04182666540145874 + e * 0.007366176228970289
        p = -0.1960711032152176 + e * (0.11163701117038727 + e * p)
        p = -0.3582781255245209 + e * (0.2751409411430359 + e * p)
        p = -0.7213394045829773 + e * (0.48067620396614075 + e * p)
        g = -rate * (tl.maximum(x, 0.0) * LOG2E + e * (1.4426950216293335 + e * p))
    else:
        g = (lower_bound * LOG2E) / (1.0 + tl.exp2((f + bias) * (-LOG2E * rate)))
    return g


@triton.jit
def multiply(x, y):
    return x * y


@triton.jit
def level_decay(before, after, h: tl.constexpr, A: tl.constexpr, S: tl.constexpr, D: tl.constexpr):
    """Decay of every token at level h < A: from the segment's middle for rows, up to it for columns.

    `before` [A, S, D] multiplies the decays of a token's own segment of h tokens up to and with it, `after`
    those of the tokens behind it.
    """
    x = tl.reshape(before, [A // (2 * h), 2, h, S, D])
    y = tl.reshape(after, [A // (2 * h), 2, h, S, D])
    second = tl.arange(0, 2)[None, :, None, None, None] == 1
    return tl.reshape(tl.where(second, x, y), [A, S, D])


@triton.jit
def double_segments(before, after, h: tl.constexpr, A: tl.constexpr, S: tl.constexpr, D: tl.constexpr):
    """The products of `level_decay` over segments of 2h tokens, from those over segments of h."""
    x = tl.reshape(before, [A // (2 * h), 2, h, S, D])
    y = tl.reshape(after, [A // (2 * h), 2, h, S, D])
    second = tl.arange(0, 2)[None, :, None, None, None] == 1
    last = tl.arange(0, h)[None, None, :, None, None] == h - 1
    first_total = tl.sum(tl.where(last & (second == 0), x, 0.0), axis=1, keep_dims=True)
    first_total = tl.sum(first_total, axis=2, keep_dims=True)
    second_total = tl.sum(tl.where(last & second, x, 0.0), axis=1, keep_dims=True)
    second_total = tl.sum(second_total, axis=2, keep_dims=True)
    x = tl.where(second, x * first_total, x)
    y = tl.where(second, y, y * second_total)
    return tl.reshape(x, [A, S, D]), tl.reshape(y, [A, S, D])


@triton.jit
def sub_chunk_totals(before, A: tl.constexpr):
    """Decay over whole sub-chunks [1, S, D], once `before` multiplies over segments of A tokens."""
    last = tl.arange(0, A)[:, None, None] == A - 1
    return tl.sum(tl.where(last, before, 0.0), axis=0, keep_dims=True)


@triton.jit
def double_sub_chunks(offset_before, offset_after, totals, h: tl.constexpr, S: tl.constexpr, D: tl.constexpr):
    """As `double_segments`, for segments of h sub-chunks: products over those before and behind each one.

    All three are [1, S, D]; sub-chunk s itself is in neither offset.
    """
    second = tl.arange(0, 2)[None, :, None, None] == 1
    t = tl.reshape(totals, [S // (2 * h), 2, h, D])
    halves = tl.reduce(t, 2, multiply, keep_dims=True)
    first_total = tl.sum(tl.where(second, 0.0, halves), axis=1, keep_dims=True)
    second_total = tl.sum(tl.where(second, halves, 0.0), axis=1, keep_dims=True)
    x = tl.reshape(offset_before, [S // (2 * h), 2, h, D])
    y = tl.reshape(offset_after, [S // (2 * h), 2, h, D])
    x = tl.where(second, x * first_total, x)
    y = tl.where(second, y, y * second_total)
    return tl.reshape(x, [1, S, D]), tl.reshape(y, [1, S, D])


@triton.jit
def outer_decay(before, after, offset_before, offset_after, h: tl.constexpr, S: tl.constexpr):
    """As `level_decay`, at the level that pairs halves of h sub-chunks."""
    second = (tl.arange(0, S) // h) % 2 == 1
    return tl.where(second[None, :, None], before * offset_before, after * offset_after)


@triton.jit
def level_mask(row, column, h: tl.constexpr):
    """True where token `row` is in the second half of a segment of 2h tokens and `column` in its first."""
    return (row // (2 * h) == column // (2 * h)) & ((row // h) % 2 == 1) & ((column // h) % 2 == 0)
