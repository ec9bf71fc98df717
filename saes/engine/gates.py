"""Loss and gradients of the kinds whose latents pass a gate: JumpReLU and gated SAEs.

The support is every pair whose gate is open or near to opening. It is sparse once training has settled; until then
the same formulas run on dense matrices.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saes.config import GatedConfig, JumpReLUConfig
from saes.engine.codes import Codes, DenseCodes
from saes.engine.select import Encoder
from saes.engine.weights import Weights

__all__ = ["gated", "jumprelu"]

DENSE = 0.05
"""Above this share of all pairs the dense products are the faster ones."""

Found = tuple[float, dict[str, Tensor], Bool[Tensor, " latent"]]


def jumprelu(
    config: JumpReLUConfig, weights: Weights, x: Float[Tensor, "row d"], warm: float, encoder: Encoder
) -> Found:
    """Squared error plus the L0 penalty (`JumpReLUConfig`); straight-through gradients for the thresholds only.

    With `u` the pre-activation, `t` the threshold, `e` the bandwidth and `K` the rectangle of width 1, the
    pseudo-derivatives are `d/dt u 1[u > t] = -t/e K((u-t)/e)` and `d/dt 1[u > t] = -1/e K((u-t)/e)`.
    """
    W_dec, threshold, width = weights["W_dec"], weights["threshold"], config.bandwidth
    read = x - weights["b_dec"]
    codes, pre = _support(encoder, read, weights, threshold - width / 2)
    jump = codes.take(threshold)
    active = (pre > jump).to(pre)
    near = ((pre - jump) / width).abs_().lt_(0.5).to(pre)
    value = pre * active
    error = codes.decode(value, W_dec) + weights["b_dec"] - x
    flow = error * (2 / len(x))
    into = codes.pair(flow, W_dec)
    l0 = codes.row_total(active)
    weight = warm * config.l0_coefficient
    if config.target_l0 is None:
        penalty, slope = l0, torch.ones_like(l0)
    else:
        miss = l0 - config.target_l0
        penalty, slope = 2 / config.target_l0 * miss.square(), 4 / config.target_l0 * miss
    loss = error.square().sum().item() / len(x) + weight * penalty.mean().item()
    to_threshold = -near * (jump * into + codes.of_rows(slope) * (weight / len(x))) / width
    into = into * active
    result = {"W_dec": codes.gather(value, flow, encoder.kept("W_dec", W_dec))}
    result |= {"enc": codes.gather(into, read, encoder.kept("enc", weights["enc"])), "b_enc": codes.total(into)}
    result["b_dec"] = flow.sum(0) - result["b_enc"] @ weights["enc"]
    result["threshold"] = codes.total(to_threshold)
    return loss, result, codes.total(active) > 0


def gated(config: GatedConfig, weights: Weights, x: Float[Tensor, "row d"], warm: float, encoder: Encoder) -> Found:
    """Squared error, L1 of the gate path, and squared error of the gate path alone (`GatedConfig`).

    With `u = (x - b_dec) @ W_enc`, gate `p = u + b_gate`, magnitude `m = exp(r_mag) u + b_mag`:
    `f = 1[p > 0] relu(m)`, `L = |x - dec(f)|^2 + c sum_j relu(p_j) ||W_dec_j|| + |x - dec(relu(p))|^2`.
    """
    W_dec, rows = weights["W_dec"], len(x)
    norm, gain = W_dec.norm(dim=-1), weights["r_mag"].exp()
    read = x - weights["b_dec"]
    codes, pre = _support(encoder, read, weights, torch.zeros_like(norm))
    gate = pre.relu()
    inner = pre - codes.take(weights["b_enc"])
    magnitude = codes.take(gain) * inner + codes.take(weights["b_mag"])
    value = magnitude.relu() * (gate > 0)
    weight = warm * config.l1_coefficient
    error = codes.decode(value, W_dec) + weights["b_dec"] - x
    error_gate = codes.decode(gate, W_dec) + weights["b_dec"] - x
    used = codes.total(gate)
    loss = (error.square().sum() + error_gate.square().sum()).item() / rows + weight * (used @ norm).item() / rows
    flow, flow_gate = error * (2 / rows), error_gate * (2 / rows)
    to_magnitude = codes.pair(flow, W_dec) * (value > 0)
    to_gate = (codes.pair(flow_gate, W_dec) + codes.take(norm) * (weight / rows)) * (gate > 0)
    scaled = to_magnitude * codes.take(gain)
    into = scaled + to_gate
    per_norm = (used / norm.clamp(min=1e-12))[:, None] * W_dec * (weight / rows)
    by_magnitude = codes.gather(value, flow, encoder.kept("W_dec", W_dec))
    by_gate = codes.gather(gate, flow_gate, encoder.kept("W_dec of the gate", W_dec))
    result = {"W_dec": by_magnitude.add_(by_gate).add_(per_norm)}
    result |= {"enc": codes.gather(into, read, encoder.kept("enc", weights["enc"])), "b_enc": codes.total(to_gate)}
    result |= {"b_mag": codes.total(to_magnitude)}
    result["r_mag"] = codes.total(scaled * inner)
    result["b_dec"] = flow.sum(0) + flow_gate.sum(0) - codes.total(into) @ weights["enc"]
    return loss, result, codes.total((value > 0).to(value)) > 0


def _support(encoder: Encoder, read: Tensor, weights: Weights, bound: Tensor) -> tuple[Codes, Any]:
    """Codes above their latent's bound and their pre-activations; dense where there are many."""
    codes, pre = encoder.above(read, weights["enc"], weights["b_enc"], bound, DENSE)
    return (DenseCodes(len(read), len(weights["enc"])), pre) if codes is None else (codes, pre)
