"""Feed-forward layers for vLLM: the dense MLP and the mixture of experts."""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import KimiLinearConfig
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

from kimi_linear.vllm_plugin.weights import (
    Part,
    WeightParts,
    keep_weights_in_place,
    merged_parts,
    new_parameter,
    width_share,
)


class DenseMLP(nn.Module, WeightParts):
    """down(silu(gate(x)) * up(x)), its width shared by tensor-parallel ranks, which need not divide it.

    Args:
        reduce_results: sum over the ranks; else each returns its addend.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        vllm_config: VllmConfig,
        prefix: str,
        reduce_results: bool = True,
    ) -> None:
        super().__init__()
        quant = vllm_config.quant_config
        self.intermediate, self.share = intermediate, width_share(intermediate)
        ranks = get_tensor_model_parallel_world_size()
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden,
            [ranks * self.share] * 2,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            ranks * self.share,
            hidden,
            bias=False,
            reduce_results=reduce_results,
            quant_config=quant,
            prefix=f"{prefix}.down_proj",
        )
        self.activation = SiluAndMul()
        keep_weights_in_place(self)

    def weight_parts(self) -> dict[str, Part]:
        hidden = self.gate_up_proj.input_size
        rows = {f"{name}_proj.weight": (self.intermediate, self.share) for name in ("gate", "up")}
        parts = merged_parts("gate_up_proj.weight", rows, hidden)
        parts["down_proj.weight"] = Part(
            "down_proj.weight", None, (hidden, self.intermediate), split=1, share=self.share
        )
        return {name: replace(part, loader="cuts") for name, part in parts.items()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]."""
        return self.down_proj(self.activation(self.gate_up_proj(x)[0]))[0]


class SparseMoE(nn.Module, WeightParts):
    """Routed experts and one shared expert.

    The router follows DeepSeek-V3 (arXiv:2412.19437, section 2.1.2): sigmoid scores choose, with a bias
    that balances load, within the best groups; the scores without the bias weigh the chosen experts'
    outputs. Tensor-parallel ranks share the width of every expert.
    """

    def __init__(self, config: KimiLinearConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.hidden, self.intermediate = config.hidden_size, config.moe_intermediate_size
        self.share = width_share(self.intermediate)
        self.experts, self.top_k = config.num_experts, config.num_experts_per_token
        self.groups, self.top_groups = config.num_expert_group, config.topk_group
        self.renormalize, self.scaling = config.moe_renormalize, config.routed_scaling_factor
        self.gate_weight = new_parameter((self.experts, self.hidden), torch.float32)
        self.correction_bias = new_parameter((self.experts,), torch.float32)
        # Gate and up projections in turn: w1 of expert 0, w3 of expert 0, w1 of expert 1, ...
        self.gate_up = new_parameter((2 * self.experts, self.share, self.hidden))
        self.down = new_parameter((self.experts, self.hidden, self.share))
        self.shared_experts = None
        if config.num_shared_experts:
            self.shared_experts = DenseMLP(
                self.hidden,
                self.intermediate * config.num_shared_experts,
                vllm_config,
                f"{prefix}.shared_experts",
                reduce_results=False,
            )

    def weight_parts(self) -> dict[str, Part]:
        parts = {
            "gate.weight": Part("gate_weight", None, (self.experts, self.hidden)),
            "gate.e_score_correction_bias": Part("correction_bias", None, (self.experts,)),
        }
        up, down = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        for e in range(self.experts):
            for i, name in enumerate(("w1", "w3"), start=2 * e):
                parts[f"experts.{e}.{name}.weight"] = Part("gate_up", i, up, i, 0, self.share)
            parts[f"experts.{e}.w2.weight"] = Part("down", e, down, e, 1, self.share)
        return parts

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, hidden] -> the chosen experts [T, top_k] and their weights [T, top_k] in float32."""
        scores = F.linear(x.float(), self.gate_weight).sigmoid()
        choice = scores + self.correction_bias
        if self.groups > 1:
            grouped = choice.unflatten(-1, (self.groups, -1))
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.top_groups, dim=-1).indices
            closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, False)
            choice = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)
        chosen = choice.topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * self.scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]."""
        chosen, weights = self.route(x)
        routed = self.fused(x, chosen, weights) if x.is_cuda else self.expert_by_expert(x, chosen, weights)
        if self.shared_experts is not None:
            routed = routed + self.shared_experts(x)
        return tensor_model_parallel_all_reduce(routed)

    def fused(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """All experts in vLLM's grouped kernels, which CUDA graphs can hold."""
        from vllm.model_executor.layers.fused_moe import fused_experts

        gate_up = self.gate_up.view(self.experts, 2 * self.share, self.hidden)
        return fused_experts(x, gate_up, self.down, weights, chosen.int())

    def expert_by_expert(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As `fused`, on the CPU."""
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.experts).tolist()
        tokens = order // self.top_k
        rows = x[tokens].split(counts)
        outputs = []
        for e, expert_rows in enumerate(rows):
            if len(expert_rows):
                gate, up = F.linear(expert_rows, self.gate_up[2 * e : 2 * e + 2].flatten(0, 1)).chunk(
                    2, dim=-1
                )
                outputs.append(F.linear(F.silu(gate) * up, self.down[e]))
        weighted = torch.cat(outputs) * weights.flatten()[order].unsqueeze(-1).to(x.dtype)
        return torch.zeros_like(x).index_add(0, tokens, weighted)
