"""The training model against transformers' Kimi Linear, against itself packed and cached; its refusals."""

from pathlib import Path

import pytest
import torch
from reference_models import as_transformers, random_model, relative_error, released_gradients
from transformers import KimiLinearConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

from kimi_linear.checkpoint import released_tensors
from kimi_linear.config import mla_twin, preset
from kimi_linear.layers.mla import rotate
from kimi_linear.model import KimiLinearForCausalLM

MOE = {
    "num_experts": 8,
    "num_experts_per_token": 3,
    "num_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 40,
    "num_expert_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.446,
}
CONFIGS = {
    "dense hybrid": {},
    "experts in groups": {**MOE, "full_attention_layers": [1, 3]},
    "experts without renormalisation": {
        **MOE,
        "num_expert_group": 1,
        "topk_group": 1,
        "moe_renormalize": False,
        "first_k_dense_replace": 0,
        "full_attention_layers": [2],
    },
    "odd sizes": {
        "hidden_size": 60,
        "intermediate_size": 77,
        "linear_num_heads": 3,
        "linear_head_dim": 13,
        "num_attention_heads": 5,
        "qk_nope_head_dim": 7,
        "qk_rope_head_dim": 6,
        "v_head_dim": 19,
        "kv_lora_rank": 33,
        "linear_conv_kernel_dim": 3,
    },
    "only MLA": {"full_attention_layers": [1, 2, 3, 4]},
    "only KDA": {"full_attention_layers": []},
}


def config_of(name: str) -> KimiLinearConfig:
    return preset("tiny", CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    model = random_model(config_of(name)).train()
    other = as_transformers(model, tmp_path / "model")
    lengths = torch.randint(1, 150, (3,))
    ids = torch.randint(1, 128, (3, int(lengths.max())))
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    labels = ids.masked_fill(~mask | (torch.rand(ids.shape) < 0.2), -100)
    ours = model(ids, attention_mask=mask.long(), labels=labels)
    theirs = other(ids, attention_mask=mask.long(), labels=labels, use_cache=False)
    assert relative_error(ours.logits[mask], theirs.logits[mask]) < 1e-4
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=0)
    ours.loss.backward()
    theirs.loss.backward()
    gradients = dict(released_tensors({n: p.grad for n, p in model.named_parameters()}))
    expected = released_gradients(other)
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        assert (
            relative_error(gradient, expected[key]) < 1e-4 or (gradient - expected[key]).abs().max() < 1e-9
        ), key


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side: str) -> None:
    model = random_model(preset("tiny"))
    sequences = [torch.randint(1, 128, (n,)) for n in (1, 17, 70)]
    ids = torch.zeros(3, 70, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        where = slice(70 - len(sequence), 70) if side == "left" else slice(0, len(sequence))
        ids[row, where], mask[row, where] = sequence, 1
    labels = ids.masked_fill(mask == 0, -100)
    padded = model(ids, attention_mask=mask, labels=labels)
    row = torch.cat(sequences)[None]
    packed = model(row, cu_seqlens=torch.tensor([0, 1, 18, 88]), labels=row)
    assert relative_error(padded.logits[mask.bool()], packed.logits[0]) < 1e-5
    torch.testing.assert_close(padded.loss, packed.loss)
    positions = torch.cat([torch.arange(len(s)) for s in sequences])[None]
    assert torch.equal(model(row, position_ids=positions).logits, packed.logits)


def test_packed_loss_is_the_mean_over_tokens_of_the_sequences_alone() -> None:
    model = random_model(preset("tiny"))
    sequences = [torch.randint(1, 128, (1, n)) for n in (5, 1, 33)]
    total = sum(model(s, labels=s).loss * (s.shape[1] - 1) for s in sequences if s.shape[1] > 1)
    row = torch.cat(sequences, 1)
    cu_seqlens = torch.tensor([0, 5, 6, 39])
    torch.testing.assert_close(model(row, cu_seqlens=cu_seqlens, labels=row).loss, total / 36)
    scaled = model(row, cu_seqlens=cu_seqlens, labels=row, num_items_in_batch=100).loss
    torch.testing.assert_close(scaled, total / 100)


@pytest.mark.parametrize("kind", ["hybrid", "experts", "rope twin", "nope twin"])
def test_prefill_and_decode_equal_the_whole_forward(kind: str) -> None:
    config = config_of("experts in groups") if kind == "experts" else preset("tiny")
    if kind.endswith("twin"):
        config = mla_twin(config, kind.removesuffix(" twin"))  # type: ignore[arg-type]
    model = random_model(config).eval()
    prompts, steps = [1, 3, 40], 24
    sequences = [torch.randint(1, 128, (n + steps,)) for n in prompts]
    whole = [model(s[None]).logits[0] for s in sequences]
    ids = torch.cat([s[:n] for s, n in zip(sequences, prompts, strict=True)])
    logits, cache = model.prefill(ids, torch.tensor([0, *prompts]).cumsum(0))
    rows = [0, 1, 2]
    for step in range(steps):
        expected = torch.stack([whole[r][prompts[r] - 1 + step] for r in rows])
        assert relative_error(logits, expected) < 1e-5
        if step == 10:
            rows = [2, 0]
            cache = cache.select(torch.tensor(rows))
        logits = model.decode(torch.stack([sequences[r][prompts[r] + step] for r in rows]), cache)


def test_changing_a_later_token_leaves_earlier_logits_bit_for_bit() -> None:
    for config in (preset("tiny"), mla_twin(preset("tiny"))):
        model = random_model(config)
        ids = torch.randint(1, 128, (1, 100))
        changed = ids.clone()
        changed[0, 60:] = (ids[0, 60:] + 1) % 127 + 1
        assert torch.equal(model(ids).logits[:, :60], model(changed).logits[:, :60])


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = random_model(config_of("experts in groups")).train()
    ids = torch.randint(1, 128, (2, 50))
    gradients = []
    saved: list[int] = []
    for enabled in (False, True):
        model.zero_grad()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(ids, labels=ids).loss
        saved.append(kept)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
    assert saved[1] < saved[0] / 4


def test_generate_equals_greedy_decoding_with_the_cache() -> None:
    model = random_model(preset("tiny")).eval()
    prompt = torch.randint(3, 128, (1, 9))
    generated = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 9:]
    logits, cache = model.prefill(prompt[0], torch.tensor([0, 9]))
    for token in generated:
        assert logits.argmax() == token
        logits = model.decode(token[None], cache)


def test_rope_scores_equal_deepseeks_interleaved_convention() -> None:
    q, k = torch.randn(2, 20, 3, 8).unbind(0)
    positions = torch.randint(0, 1000, (20,))
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    angles = (positions[:, None] * frequencies).repeat(1, 2)[None]
    theirs = apply_rotary_pos_emb_interleave(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], angles.cos(), angles.sin()
    )
    expected = theirs[0] @ theirs[1].transpose(-1, -2)
    ours_q, ours_k = (rotate(x, positions, 10000.0).transpose(0, 1) for x in (q, k))
    torch.testing.assert_close(ours_q @ ours_k.transpose(-1, -2), expected[0], rtol=1e-4, atol=1e-4)


def test_without_rope_or_kda_the_order_of_earlier_tokens_is_lost() -> None:
    ids = torch.randint(1, 128, (1, 30))
    shuffled = torch.cat((ids[:, torch.randperm(29)], ids[:, -1:]), 1)
    for position, carried in (("nope", False), ("rope", True)):
        config = mla_twin(
            preset(
                "tiny", {"num_hidden_layers": 1, "full_attention_layers": [1], "first_k_dense_replace": 1}
            ),
            position,
        )
        model = random_model(config)
        difference = relative_error(model(ids).logits[0, -1], model(shuffled).logits[0, -1])
        assert (difference > 1e-4) == carried, position


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_cache": True}, "use_cache=True is not served"),
        ({"output_hidden_states": True}, "output_hidden_states=True is not served"),
        ({"inputs_embeds": torch.zeros(2, 4, 128)}, "exactly one of input_ids and inputs_embeds"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask must be \[2, 4\], got \[2, 3\]"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "B must be 1, got 2"),
        ({"labels": torch.ones(2, 4, dtype=torch.int64), "logits_to_keep": 1}, "logits_to_keep leaves out"),
    ],
)
def test_contradictory_inputs_are_refused(arguments: dict[str, object], message: str) -> None:
    model = KimiLinearForCausalLM(preset("tiny"))
    with pytest.raises(ValueError, match=message):
        model(torch.ones(2, 4, dtype=torch.int64), **arguments)


def test_an_empty_prompt_is_refused() -> None:
    model = KimiLinearForCausalLM(preset("tiny"))
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        model.prefill(torch.ones(2, dtype=torch.int64), torch.tensor([0, 2, 2]))


def test_sequences_of_one_length_are_attended_as_those_of_many() -> None:
    model = random_model(mla_twin(preset("tiny")))
    ids = torch.randint(1, 128, (3, 21))
    # An empty sequence changes no result and makes the lengths differ.
    packed = model(ids.view(1, -1), cu_seqlens=torch.tensor([0, 21, 21, 42, 63])).logits
    torch.testing.assert_close(model(ids).logits.view(1, 63, -1), packed)
