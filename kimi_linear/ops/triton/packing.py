"""Chunks of packed sequences, found on the device: the host never waits to learn a length."""

import torch
import triton
import triton.language as tl

CHUNK = 64


@triton.jit
def chunk_table_kernel(
    cu_seqlens, table, starts, sequences, chunks, C: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr
):
    """Write for each chunk its sequence and its index there, and for each sequence its first chunk.

    A chunk's sequence is the number of sequences whose chunks all end before it.
    """
    program = tl.program_id(0)
    chunk = program * BC + tl.arange(0, BC)
    sequence = tl.zeros([BC], dtype=tl.int32)
    first = tl.zeros([BC], dtype=tl.int32)
    base = 0
    for start in range(0, sequences, BN):
        n = start + tl.arange(0, BN)
        inside = n < sequences
        lengths = tl.load(cu_seqlens + n + 1, mask=inside, other=0) - tl.load(
            cu_seqlens + n, mask=inside, other=0
        )
        counts = ((lengths + C - 1) // C).to(tl.int32)
        ends = base + tl.cumsum(counts, axis=0)
        if program == 0:
            tl.store(starts + n, ends - counts, mask=inside)
        over = inside[None, :] & (ends[None, :] <= chunk[:, None])
        sequence += tl.sum(over.to(tl.int32), axis=1)
        first = tl.maximum(first, tl.max(tl.where(over, ends[None, :], 0), axis=1))
        base += tl.sum(counts, axis=0)
    inside = chunk < chunks
    tl.store(table + 2 * chunk, sequence, mask=inside)
    tl.store(table + 2 * chunk + 1, chunk - first, mask=inside)


def chunk_table(cu_seqlens: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks of `tokens` packed tokens: a table [chunks, 2] of (sequence, index) and each sequence's first
    chunk.

    The number of chunks is an upper bound; those beyond the last carry the sequence number N.
    """
    sequences = cu_seqlens.numel() - 1
    chunks = tokens // CHUNK + sequences
    table = torch.empty(chunks, 2, dtype=torch.int32, device=cu_seqlens.device)
    starts = torch.empty(sequences, dtype=torch.int32, device=cu_seqlens.device)
    block = 64
    chunk_table_kernel[(triton.cdiv(chunks, block),)](
        cu_seqlens, table, starts, sequences, chunks, C=CHUNK, BN=128, BC=block, num_warps=4
    )
    return table, starts
