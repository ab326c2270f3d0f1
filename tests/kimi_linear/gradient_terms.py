"""The terms of gradients that are sums of both signs: few such sums may all come near zero, and an error that
is nothing beside the terms is then large beside the sums.
"""

import torch

from kimi_linear.ops.arguments import kda_gate


def rate_gradient_terms(
    f: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    lower_bound: float | None,
    f_grad: torch.Tensor,
) -> torch.Tensor:
    """What each token and channel adds to the gradient of A_log, [..., HV, K].

    Args:
        f, a_log, dt_bias, lower_bound: as `kda_gate` takes them.
        f_grad: gradient of f, in its shape.
    """
    f, a_log, f_grad = (x.detach().double() for x in (f, a_log, f_grad))

    def gate(f: torch.Tensor, a_log: torch.Tensor) -> torch.Tensor:
        return kda_gate(f, a_log, dt_bias.detach(), lower_bound)

    zero, one = torch.zeros_like, torch.ones_like
    by_f = torch.func.jvp(gate, (f, a_log), (one(f), zero(a_log)))[1]
    by_rate = torch.func.jvp(gate, (f, a_log), (zero(f), one(a_log)))[1]
    return torch.where(by_f == 0, 0.0, f_grad / by_f) * by_rate
