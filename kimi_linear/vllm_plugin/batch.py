"""How vLLM's flat batch splits into rows that decode one token and sequences that prefill several."""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

NONE = torch.empty(0, dtype=torch.int64)
NO_BOUNDARIES = torch.zeros(1, dtype=torch.int64)


@dataclass(frozen=True)
class BatchSplit:
    """One engine step. Tokens of all sequences lie back to back, sequences of one token first.

    Attributes:
        num_decodes: sequences, and so tokens, in the decode part, those included that only fill up a CUDA
            graph and have no token.
        cu_seqlens: [P + 1] int64 on the host, boundaries of the P prefilling sequences, counted from the
            first token after the decode part.
        lengths: [N] int64 on the host, tokens of each sequence after this step, the decode part first.
        fresh: [F] int64 on the host, the sequences without an earlier token.
    """

    num_decodes: int
    cu_seqlens: torch.Tensor
    lengths: torch.Tensor
    fresh: torch.Tensor

    @property
    def num_prefills(self) -> int:
        return len(self.cu_seqlens) - 1


def split_batch(common: CommonAttentionMetadata) -> BatchSplit:
    """Split a batch that vLLM has ordered with `reorder_batch_threshold = 1`."""
    lengths = common.seq_lens_cpu_upper_bound
    assert lengths is not None, "the model runner gives sequence lengths on the host"
    lengths = lengths[: common.num_reqs].long()
    prefilling = None if common.is_prefilling is None else common.is_prefilling[: common.num_reqs]
    if common.max_query_len == 1 and prefilling is not None and not prefilling.any():
        # Nearly every step, and nothing but the host's time bounds one of few sequences.
        return BatchSplit(common.num_reqs, NO_BOUNDARIES, lengths, NONE)
    starts = common.query_start_loc_cpu[: common.num_reqs + 1].long()
    queries = starts.diff()
    num_decodes = common.num_reqs
    if common.max_query_len > 1:
        num_decodes = int((queries > 1).int().argmax())
    fresh = (lengths == queries) & (queries > 0)
    if prefilling is not None:
        # The batches that CUDA graphs are captured with have no earlier token either, yet begin nothing.
        fresh &= prefilling
    return BatchSplit(
        num_decodes, starts[num_decodes:] - starts[num_decodes], lengths, fresh.nonzero().squeeze(1)
    )
