"""`chunk_kda` in steps, for ranks that share sequences along their tokens: chunks are prepared once.

What a rank's tokens make of any state, and what its outputs ask of the state that it starts from, need no
other rank; only the scans that follow from these do.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from kimi_linear.ops.triton.chunk import (
    HOPPER_OPTIONS,
    MAX_HEAD_SIZE,
    Problem,
    Scanned,
    ScannedBack,
    gradients,
    new_final_state,
    new_problem,
    prepare,
    scan_again,
    scan_backward,
    scan_forward,
)
from kimi_linear.ops.triton.scan_hopper import SLICE, STAGES, scan_hopper_kernel, serves


class ChunkSteps:
    """One call on packed sequences; `kimi_linear.ops.context_parallel.Steps` says what each step does."""

    def __init__(
        self,
        tensors: tuple[Any, ...],
        cu_seqlens: torch.Tensor,
        needs_grad: bool,
        scale: float | None = None,
        use_qk_l2norm_in_kernel: bool = False,
        use_gate_in_kernel: bool = False,
        use_beta_sigmoid_in_kernel: bool = False,
        lower_bound: float | None = None,
    ) -> None:
        q, k, v, g, beta, a_log, dt_bias = tensors
        self.problem = new_problem(
            q, v, cu_seqlens, scale, use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel,
            lower_bound,
        )  # fmt: skip
        q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
        self.tensors = q, k, v, g, beta, a_log, dt_bias
        self.values = v
        self.prepared = prepare(self.problem, q, k, g, beta, a_log, dt_bias, backward=needs_grad)
        self.incoming: torch.Tensor | None = None
        self.scanned: Scanned | None = None
        self.back: ScannedBack | None = None
        self.output_grad: torch.Tensor | None = None

    def _of_one(self, sequence: int) -> Problem:
        """The scans' problem of one sequence, the first or the last; chunks stay where they are."""
        p = self.problem
        assert p.cu_seqlens is not None
        assert p.starts is not None
        at = sequence % p.sequences
        # Copies, because kernels are compiled for the alignment of what they get.
        bounds, starts = p.cu_seqlens[at : at + 2].clone(), p.starts[at : at + 1].clone()
        return replace(p, sequences=1, cu_seqlens=bounds, starts=starts)

    def transition(self, through: bool) -> torch.Tensor:
        p, v = self._of_one(-1), self.values
        columns = p.value_dim + (p.key_dim if through else 0)
        final = torch.empty(1, p.value_heads, p.key_dim, columns, dtype=torch.float32, device=v.device)
        prepared = self.prepared
        if p.on_hopper(v.device) and serves(p.key_dim, p.value_dim):
            scan_hopper_kernel[(columns // SLICE, p.value_heads)](
                prepared.read_keys, prepared.queries, prepared.write_keys, prepared.decay, prepared.scales,
                prepared.attention, v, None, None, final, p.starts, p.cu_seqlens, p.tokens, p.scale,
                HV=p.value_heads, K=p.key_dim, V=p.value_dim, VARLEN=True, DEPTH=STAGES, THROUGH=through,
                **HOPPER_OPTIONS,
            )  # fmt: skip
            return final[0]
        if not through:
            scan_forward(p, prepared, v, None, None, final, None, None, None)
            return final[0]
        if columns > MAX_HEAD_SIZE:
            raise ValueError(f"K + V must be at most {MAX_HEAD_SIZE} here, got {columns}")
        # Values of zero leave the identity to pass through every transition.
        start = torch.zeros_like(final)
        start[..., p.value_dim :] = torch.eye(p.key_dim, device=v.device)
        p = replace(p, value_dim=columns)
        scan_forward(p, prepared, F.pad(v, (0, p.key_dim)), None, start, final, None, None, None)
        return final[0]

    def outputs(self, incoming: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        self.incoming = incoming
        o, final = torch.empty_like(self.values), new_final_state(self.problem, self.values)
        scan_forward(self.problem, self.prepared, self.values, o, incoming, final, None, None, None)
        return o, final

    def new_states(self) -> torch.Tensor:
        return new_final_state(self.problem, self.values).zero_()

    def begin_gradients(self, output_grad: torch.Tensor) -> None:
        self.output_grad = output_grad.contiguous()
        self.scanned = scan_again(self.problem, self.prepared, self.values, self.incoming)

    def asked_of_first(self) -> torch.Tensor:
        assert self.output_grad is not None
        first = self._of_one(0)
        asked = new_final_state(first, self.values)
        scan_backward(first, self.prepared, self.output_grad, None, asked, None)
        return asked[0]

    def incoming_gradient(self, outgoing_grad: torch.Tensor) -> torch.Tensor:
        assert self.output_grad is not None
        grad = torch.empty_like(outgoing_grad)
        self.back = scan_backward(
            self.problem, self.prepared, self.output_grad, outgoing_grad, grad, self.scanned
        )
        return grad

    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        assert self.output_grad is not None
        assert self.scanned is not None
        assert self.back is not None
        return gradients(
            self.problem, *self.tensors, self.prepared, self.output_grad, self.scanned, self.back
        )
