"""Feed-forward layers: the dense gated MLP and the mixture of experts."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import KimiLinearConfig

from kimi_linear.ops import swiglu


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x), [T, D] -> [T, D] (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Router(nn.Module):
    """Choose experts by the sigmoid of their logits, plus a correction that balances load (arXiv:2412.19437,
    2.1.2).

    The correction takes part in the choice alone, not in the weights. Experts are in `num_expert_group`
    groups, each scored by its two best experts; only the `topk_group` best groups are eligible.
    """

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.groups = config.n_group
        self.eligible_groups = config.topk_group
        self.renormalize = config.norm_topk_prob
        self.scaling = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_local_experts))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, D] -> experts [T, k] (int64) and their weights [T, k] (float32)."""
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        choice = scores + self.e_score_correction_bias
        if self.groups > self.eligible_groups:
            grouped = choice.unflatten(-1, (self.groups, -1))
            group_scores = grouped.topk(2, dim=-1).values.sum(-1)
            eligible = torch.zeros_like(group_scores, dtype=torch.bool)
            eligible.scatter_(-1, group_scores.topk(self.eligible_groups, dim=-1).indices, True)
            choice = grouped.masked_fill(~eligible.unsqueeze(-1), float("-inf")).flatten(-2)
        experts = choice.topk(self.experts_per_token, dim=-1).indices
        weights = scores.gather(-1, experts)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * self.scaling


class Experts(nn.Module):
    """Gated MLPs of all experts, stacked: w1 (gate) and w3 (up) [E, I, D], w2 (down) [E, D, I]."""

    def __init__(self, experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(experts, intermediate_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))
        self.w3 = nn.Parameter(torch.empty(experts, intermediate_size, hidden_size))

    def forward(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, D], experts and weights [T, k] -> the weighted sum of each token's experts [T, D]."""
        # Sorted by expert, each expert's tokens are one slice.
        order = experts.flatten().argsort(stable=True)
        tokens = order // experts.shape[1]
        counts = experts.flatten().bincount(minlength=len(self.w1)).tolist()
        outputs = []
        for expert, rows in enumerate(x[tokens].split(counts)):
            if len(rows):
                hidden = swiglu(F.linear(rows, self.w1[expert]), F.linear(rows, self.w3[expert]))
                outputs.append(F.linear(hidden, self.w2[expert]))
        if not outputs:
            return torch.zeros_like(x)
        weighted = torch.cat(outputs) * weights.flatten()[order].unsqueeze(-1).to(x.dtype)
        return torch.zeros_like(x).index_add(0, tokens, weighted)


class MixtureOfExperts(nn.Module):
    """Routed experts plus shared ones that see every token, [T, D] -> [T, D]."""

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config.num_local_experts, config.hidden_size, config.moe_intermediate_size)
        self.shared_experts = GatedMLP(
            config.hidden_size, config.moe_intermediate_size * config.n_shared_experts
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        experts, weights = self.gate(x)
        return self.experts(x, experts, weights) + self.shared_experts(x)
