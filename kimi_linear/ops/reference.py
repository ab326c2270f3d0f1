"""Kimi Delta Attention as the paper writes it, one token at a time: the oracle of every faster version.

Source: Kimi Linear (arXiv:2510.26692), equation 1. Works in float64, has gradients, and is slow.
"""

import torch


def recurrent_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance N independent states by one token each, all in one pass: a decode step.

    The state forgets, is corrected towards v along k, and is read along q:
    S <- Diag(exp g) S;  S <- S + k (beta (v - S^T k))^T;  o = scale * S^T q.

    Args:
        q, k, g: [N, HV, K]; q and k normalised, g the log-space decay (at most 0).
        v: [N, HV, V].
        beta: [N, HV], in (0, 1).
        state: [N, HV, K, V], left as it is.
        scale: factor of the output, K ** -0.5 in the model.

    Returns:
        o [N, HV, V] and the new state [N, HV, K, V].
    """
    state = state * g.exp().unsqueeze(-1)
    # One product reads the decayed state along both k and q; the rank-one update's share of o is (q . k)
    # delta.
    along_k, along_q = torch.matmul(torch.stack((k, q), dim=-2), state).unbind(-2)
    delta = beta.unsqueeze(-1) * (v - along_k)
    o = scale * (along_q + (q * k).sum(-1, keepdim=True) * delta)
    return o, state + k.unsqueeze(-1) * delta.unsqueeze(-2)


def recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence over sequences of one length.

    Args:
        q, k, g: [N, T, HV, K], activated as `recurrent_step` wants them.
        v: [N, T, HV, V].
        beta: [N, T, HV].
        scale: factor of the output.
        state: initial states [N, HV, K, V].

    Returns:
        o [N, T, HV, V] and the final states [N, HV, K, V].
    """
    outputs = []
    for t in range(q.shape[1]):
        o, state = recurrent_step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state, scale)
        outputs.append(o)
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)), state


def beta_gradient_terms(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    state: torch.Tensor,
    o_grad: torch.Tensor,
    state_grad: torch.Tensor,
) -> torch.Tensor:
    """What each value channel adds to beta's gradient.

    The terms have both signs and may cancel: beside their sum alone, an error of it may look large. No
    channel sees another, so each is a head of its own here, with its own beta.

    Args:
        q, k, v, g, beta, scale, state: as `recurrent_kda` takes them.
        o_grad, state_grad: gradients of its two results, in their shapes.

    Returns:
        [N, T, HV, V], without gradients of their own.
    """
    heads, channels = v.shape[2:]
    q, k, g, beta = (x.detach().repeat_interleave(channels, 2) for x in (q, k, g, beta))
    v, o_grad = (x.detach().flatten(2).unsqueeze(-1) for x in (v, o_grad))
    state, state_grad = (x.detach().mT.flatten(1, 2).unsqueeze(-1) for x in (state, state_grad))
    with torch.enable_grad():
        results = recurrent_kda(q, k, v, g, beta.requires_grad_(), scale, state)
    return torch.autograd.grad(results, beta, (o_grad, state_grad))[0].unflatten(2, (heads, channels))
