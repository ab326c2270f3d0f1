import pytest
import torch

from kimi_linear.config import preset
from kimi_linear.layers import KDACache, KimiDeltaAttention
from kimi_linear.ops import kda_decode_step

SLOTS = 7


@pytest.mark.parametrize(("state_dtype", "padding"), [(torch.float32, -1), (torch.bfloat16, 0)])
def test_a_decode_step_is_the_layers_own_and_touches_its_slots_alone(
    state_dtype: torch.dtype, padding: int
) -> None:
    config = preset("tiny", {"hidden_size": 48})
    layer = KimiDeltaAttention(config)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-0.5, 0.5)
    heads, dim = config.linear_num_heads, config.linear_head_dim
    x = torch.randn(2, config.hidden_size)
    slots = torch.tensor([5, padding, 2], dtype=torch.int32)
    used, others = [5, 2], [0, 1, 3, 4, 6]
    # As an engine keeps them: both states of a slot in one page.
    window = torch.randn(SLOTS, 3 * 3 * heads * dim + 11)[:, :-11].unflatten(1, (3, -1))
    state = torch.randn(SLOTS, heads, dim, dim).to(state_dtype)
    before = window.clone(), state.clone()

    def padded(rows: torch.Tensor) -> torch.Tensor:
        """Around the padding row. Projected with it, rows may round differently than without."""
        return torch.stack((rows[0], torch.randn_like(rows[0]), rows[1]))

    with torch.no_grad():
        cache = KDACache(state[used].float(), window[used].clone())
        expected = layer.decode(x, cache)
        qkv = torch.cat((layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)), dim=-1)
        filters = torch.cat((layer.q_conv1d.weight, layer.k_conv1d.weight, layer.v_conv1d.weight)).squeeze(1)
        f = layer.f_b_proj(layer.f_a_proj(x)).unflatten(-1, (heads, dim))
        gate = layer.g_b_proj(layer.g_a_proj(x)).unflatten(-1, (heads, dim))
        o = kda_decode_step(
            padded(qkv), filters, window, padded(f), padded(layer.b_proj(x)), layer.A_log, layer.dt_bias,
            state, slots, padded(gate), layer.o_norm.weight, layer.o_norm.eps, padding_slot=padding,
        )  # fmt: skip
    torch.testing.assert_close(layer.o_proj(o[[0, 2]].flatten(1)), expected, rtol=1e-4, atol=1e-5)
    assert not o[1].any()
    assert torch.equal(window[used], cache.convolution)
    torch.testing.assert_close(state[used], cache.state.to(state_dtype))
    assert torch.equal(window[others], before[0][others])
    assert torch.equal(state[others], before[1][others])
