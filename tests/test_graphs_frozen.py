"""Frozen parts are linear maps with true adjoints, and walking them gives back what the true forward pass had."""

from __future__ import annotations

import pytest
import torch
from graph_toys import bridged_pass, pairing_errors, random_pass, relu_transcoders
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from graphs.frozen.norms import FrozenNorm
from graphs.frozen.parts import FrozenBlock


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    seed=st.integers(0, 10_000), causal=st.booleans(), norm=st.sampled_from(["layer", "rms"]), heads=st.integers(1, 4)
)
def test_the_adjoint_of_every_part_is_its_transpose(seed: int, causal: bool, norm: str, heads: int) -> None:
    d = 12 if heads == 3 else 16
    frozen = random_pass(seed, d=d, heads=heads, layers=2, pos=5, causal=causal, norm=norm)
    assert max(pairing_errors(frozen, seed).values()) < 1e-12
    assert max(pairing_errors(bridged_pass(seed), seed).values()) < 1e-12


def test_an_adjoint_by_head_sums_to_the_adjoint() -> None:
    block = random_pass(3, heads=4).stacks[0].blocks[1]
    g = torch.randn(6, 5, 16, dtype=torch.float64)
    by_head = block.attention.adjoint_by_head(g)
    assert by_head.shape == (4, 6, 5, 16)
    assert torch.allclose(by_head.sum(0), block.attention.adjoint(g), atol=1e-12)


def test_a_diagonal_norm_is_a_layer_scale() -> None:
    gain, x = torch.randn(4), torch.randn(3, 4)
    assert torch.allclose(FrozenNorm.diagonal(gain, 3).apply(x), x * gain)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("causal", [True, False])
def test_each_part_gives_back_what_the_true_pass_had(norm: str, causal: bool) -> None:
    frozen = random_pass(1, causal=causal, norm=norm)
    stack = frozen.stacks[0]
    assert torch.allclose(stack.inputs.total((6, 16)), stack.blocks[0].resid_pre, atol=1e-12)
    for block in stack.blocks:
        assert_block(block)
    for placed, block in zip(relu_transcoders(frozen), stack.blocks, strict=True):
        assert torch.allclose(placed.dictionary.decode(placed.dictionary.encode(block.mlp_in)), block.mlp_out)
    (readout,) = frozen.readouts
    assert float((readout.seed * frozen.stream_of(readout)).sum()) + readout.constant == pytest.approx(readout.value)


def assert_block(block: FrozenBlock) -> None:
    attention = block.attention.apply(block.resid_pre) + block.attention.bias
    assert torch.allclose(block.resid_pre + attention, block.resid_mid, atol=1e-12)
    assert torch.allclose(block.norm2.apply(block.resid_mid), block.mlp_in, atol=1e-12)
    assert torch.allclose(block.mlp.apply(block.resid_mid) + block.mlp.bias, block.mlp_out, atol=1e-12)
    assert torch.allclose(block.resid_mid + block.mlp_out, block.resid_post, atol=1e-12)


def test_the_bridge_brings_what_the_projector_wrote() -> None:
    seen, told = bridged_pass(2).stacks
    assert told.bridge is not None
    brought = told.bridge.apply(seen.final) + told.bridge.bias
    assert torch.allclose(told.inputs.total((7, 16)) + brought, told.blocks[0].resid_pre, atol=1e-12)
