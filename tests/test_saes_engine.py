"""The training step by hand: equal to autograd of the same loss, to sae-lens's trainer, and to torch.topk."""

import time

import numpy as np
import pytest
import torch
from pretend_device import DEVICE, PretendDevice

from benchmarks.sae_lens_peer import sae_lens_trainer
from saes.config import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    TopKConfig,
    TranscoderConfig,
)
from saes.engine.codes import DenseCodes, SparseCodes
from saes.engine.gates import gated, jumprelu
from saes.engine.inference import inference
from saes.engine.product import Products
from saes.engine.select import Encoder
from saes.engine.step import gradients
from saes.engine.trainer import Trainer
from saes.engine.weights import initial
from saes.folder import read_weights
from saes.metrics import r2

ROWS, D, D_OUT, WIDTH, K = 40, 12, 10, 64, 3
SMALL = {"width": WIDTH, "batch_size": ROWS}
TOP = {"k": K, **SMALL}
KINDS = [
    TopKConfig(**TOP),
    BatchTopKConfig(**TOP),
    MatryoshkaConfig(**TOP, levels=(8, 32, 64)),
    MatryoshkaConfig(**TOP, levels=(64,)),
    JumpReLUConfig(**SMALL, threshold=0.3, bandwidth=0.2),
    JumpReLUConfig(**SMALL, threshold=0.3, bandwidth=0.2, target_l0=5),
    GatedConfig(**SMALL),
    TranscoderConfig(**TOP),
    TranscoderConfig(**TOP, sparsity="batchtopk", skip=True),
]


def names(config):
    return f"{config.kind}{'-skip' if getattr(config, 'skip', False) else ''}"


def setting(config, seed=0):
    """Random weights, none at a special value, and a batch."""
    torch.manual_seed(seed)
    d_out = D_OUT if config.kind == "transcoder" else D
    x = torch.randn(ROWS, D)
    weights = initial(config, D, torch.randn(d_out), seed)
    weights = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in weights.items()}
    weights["W_dec"] *= 0.5 + torch.rand(WIDTH, 1)
    return weights, x, torch.randn(ROWS, d_out) if config.kind == "transcoder" else x


def by_autograd(config, weights, x, y, dead, warm):
    """The loss as the papers write it, dense, and torch's gradients of it. After sae_lens 6.54's classes."""
    w = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    read = x if config.kind == "transcoder" else x - w["b_dec"]
    pre, norm = read @ w["enc"].T + w["b_enc"], w["W_dec"].norm(dim=-1)

    def squared(found):
        return (found - y).square().sum(-1).mean()

    if config.kind == "jumprelu":
        # d/dt of u 1[u > t] and of 1[u > t], as a surrogate with the right value and gradient
        near = (((pre - w["threshold"]) / config.bandwidth).abs() < 0.5).float() / config.bandwidth
        on = (pre > w["threshold"]).float()
        moved = -near.detach() * (w["threshold"] - w["threshold"].detach())
        acts = pre * on + w["threshold"].detach() * moved
        l0 = (on + moved).sum(-1)
        goal = config.target_l0
        penalty = l0 if goal is None else 2 / goal * (l0 - goal).square()
        loss = squared(acts @ w["W_dec"] + w["b_dec"]) + warm * config.l0_coefficient * penalty.mean()
    elif config.kind == "gated":
        gate = pre.relu()
        acts = (read @ w["enc"].T * w["r_mag"].exp() + w["b_mag"]).relu() * (pre > 0)
        loss = squared(acts @ w["W_dec"] + w["b_dec"]) + squared(gate @ w["W_dec"] + w["b_dec"])
        loss = loss + warm * config.l1_coefficient * (gate * norm).sum(-1).mean()
    else:
        z = pre * norm
        by_row = config.kind == "topk" or (config.kind == "transcoder" and config.sparsity == "topk")
        flat = z if by_row else z.flatten()[None]
        kept = flat.topk(K if by_row else K * ROWS, dim=-1)
        acts = torch.zeros_like(flat).scatter(-1, kept.indices, kept.values.relu()).view_as(z) / norm
        out = w["b_dec"] + (read @ w["W_skip"] if "W_skip" in w else 0)
        levels = getattr(config, "levels", (WIDTH,))
        loss = sum(squared(acts[:, :end] @ w["W_dec"][:end] + out) for end in levels)
        if dead.any():
            residual = (y - acts @ w["W_dec"] - out).detach()
            count, wanted = int(dead.sum()), D // 2
            best = torch.where(dead, z, -torch.inf).topk(min(count, wanted), dim=-1)
            aux = torch.zeros_like(z).scatter(-1, best.indices, best.values) / norm
            loss = loss + min(count / wanted, 1) * (aux @ w["W_dec"] - residual).square().sum(-1).mean()
    loss.backward()
    return loss.item(), {name: tensor.grad for name, tensor in w.items()}


def assert_close(found, wanted):
    """Relative to the largest entry of each gradient."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        size = wanted[name].abs().max().clamp(min=1e-6)
        torch.testing.assert_close(found[name] / size, wanted[name] / size, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("n_dead", [0, 4, 30])
@pytest.mark.parametrize("config", KINDS, ids=names)
def test_gradients_equal_autograd(config, n_dead):
    weights, x, y = setting(config, seed=n_dead)
    dead = torch.arange(WIDTH) % 2 == 1
    dead &= dead.cumsum(0) <= n_dead
    step = gradients(config, weights, x, y, dead, 0.7, Encoder())
    loss, wanted = by_autograd(config, weights, x, y, dead, 0.7)
    assert step.loss == pytest.approx(loss, rel=1e-5)
    assert_close(step.gradients, wanted)


@pytest.mark.parametrize("config", [c for c in KINDS if c.kind in ("jumprelu", "gated")], ids=names)
def test_sparse_and_dense_gates_agree(config, monkeypatch):
    weights, x, _ = setting(config)
    weights["b_enc"] -= 0.5
    run = jumprelu if config.kind == "jumprelu" else gated
    found = []
    for share in (0.0, 1.0):
        monkeypatch.setattr("saes.engine.gates.DENSE", share)
        found.append(run(config, weights, x, 1.0, Encoder()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert_close(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param  # workers with one thread each have left it alone
    torch.set_num_threads(before)


@pytest.mark.parametrize("openblas", [True, False])
@pytest.mark.parametrize("entries", [700, 10**6])
@pytest.mark.parametrize(("width", "k"), [(64, 3), (1000, 5), (513, 16), (40, 20)])
def test_choice_is_that_of_torch_topk(width, k, entries, openblas, threads, monkeypatch):
    monkeypatch.setattr("saes.engine.product._openblas_is_faster", lambda: openblas)
    monkeypatch.setattr("saes.engine.product.ROWS", 7)
    monkeypatch.setattr("saes.engine.product.BYTES", 4 * entries)
    torch.manual_seed(width)
    W, b, encoder = torch.randn(width, 8), torch.randn(width), Encoder()
    W[: width // 2] *= 30  # the large ones sit together
    gain = torch.rand(width)
    gain[3] = 0.0
    for x in torch.randn(3, 50, 8):
        pre = torch.addmm(b, x, W.T) * gain
        for found, best in (
            (encoder.row_topk(x, W, b, gain, k), pre.topk(k, dim=1)),
            (encoder.batch_topk(x, W, b, gain, k), pre.flatten().topk(k * 50)),
        ):
            codes, value = found
            dense = torch.zeros_like(pre)
            dense[codes.row, codes.latent] = value
            flat = pre if best.indices.dim() == 2 else pre.flatten()
            wanted = torch.zeros_like(flat).scatter(-1, best.indices, best.values.relu()).view_as(pre)
            torch.testing.assert_close(dense, wanted, rtol=1e-4, atol=1e-4)
            assert ((dense > 0) == (wanted > 0)).all()
            assert (codes.row.diff() >= 0).all()


@pytest.mark.parametrize("openblas", [True, False])
def test_tiles_are_the_product_in_order(openblas, threads, monkeypatch):
    asked = []
    monkeypatch.setattr("saes.engine.product._openblas_is_faster", lambda: openblas)
    monkeypatch.setattr("saes.engine.product.ROWS", 4)
    monkeypatch.setattr("saes.engine.product.BYTES", 240)
    monkeypatch.setattr("numpy.matmul", lambda *a, matmul=np.matmul, **b: asked.append(1) or matmul(*a, **b))
    torch.manual_seed(0)
    x, W, wanted = torch.randn(11, 7), torch.randn(30, 7), torch.empty(11, 30).fill_(torch.inf)
    x[2, 3] = torch.nan

    def use(first, rows, tiles):
        at = [wanted[first : first + rows, begin : begin + tile.shape[1]].copy_(tile) for begin, tile in tiles]
        return first, len(at), torch.get_num_threads()

    found = Products().each(x, W, use)
    assert found is not None
    torch.testing.assert_close(wanted, x @ W.T, equal_nan=True)
    firsts, tiles, alone = zip(*found, strict=True)
    assert list(firsts) == sorted(firsts) and len(firsts) > 2 and min(tiles) > 1 and set(alone) == {1}
    assert bool(asked) == openblas


def test_what_is_not_wanted_of_some_rows_stops_the_rest(threads, monkeypatch):
    monkeypatch.setattr("saes.engine.product.ROWS", 1)
    monkeypatch.setattr("saes.engine.product.BYTES", 1)
    seen = []
    assert Products().each(torch.ones(500, 2), torch.ones(3, 2), lambda first, *_: seen.append(first)) is None
    assert 1 <= len(seen) <= threads
    x = torch.ones(50, 2)  # a refusal of the last rows alone counts too
    assert Products().each(x, torch.ones(3, 2), lambda first, *_: None if first == 49 else first) is None


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_same_threads_same_bytes(kind, threads, monkeypatch):
    monkeypatch.setattr("saes.engine.product.ROWS", 8)
    monkeypatch.setattr("saes.engine.product.BYTES", 4 * 8 * 40 * threads)
    config, batches = AS_OURS[kind], toy(20 * ROWS, 0).split(ROWS)
    first, again = (Trainer(config, D, batches[0].mean(0), len(batches), seed=3) for _ in range(2))
    for batch in batches:
        assert first.step(batch) == again.step(batch)
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)


def test_few_positive_entries_and_ties():
    x, W, b, gain = torch.ones(6, 2), torch.zeros(300, 2), torch.zeros(300), torch.ones(300)
    W[7], W[9] = 1.0, 1.0
    codes, value = Encoder().batch_topk(x, W, b, gain, 4)  # 12 of the 24 that are wanted are positive
    assert value.tolist() == [2.0] * 12 and codes.latent.tolist() == [7, 9] * 6
    codes, _ = Encoder().batch_topk(x, W, b, gain, 1)  # ties: the first rows
    assert codes.row.tolist() == [0, 0, 1, 1, 2, 2]
    codes, _ = Encoder().row_topk(x, W, b, gain, 4)
    assert codes.latent.tolist() == [7, 9] * 6
    codes, value = Encoder().row_topk(x, W, b + 1, gain, 5)  # 298 entries tie for three places: the first latents
    assert codes.latent.tolist() == [0, 1, 2, 7, 9] * 6 and value.tolist() == [1.0, 1.0, 1.0, 3.0, 3.0] * 6


def test_a_choice_among_nan_is_refused():
    x, W = torch.ones(6, 2), torch.ones(300, 2)
    x[4, 1] = torch.nan
    with pytest.raises(FloatingPointError, match="not a number"):
        Encoder().row_topk(x, W, torch.zeros(300), torch.ones(300), 5)


def test_a_guess_that_was_too_high_changes_nothing():
    torch.manual_seed(0)
    W, b, gain, encoder = torch.randn(100, 8), torch.zeros(100), torch.ones(100), Encoder()
    encoder.batch_topk(100 * torch.randn(50, 8), W, b, gain, 4)
    x = torch.randn(50, 8)
    codes, value = encoder.batch_topk(x, W, b, gain, 4)
    again, wanted = Encoder().batch_topk(x, W, b, gain, 4)
    assert torch.equal(value, wanted) and torch.equal(codes.latent, again.latent) and torch.equal(codes.row, again.row)


@pytest.mark.parametrize("part", [1, 15, 35, 2**20])
def test_products_of_codes(part, monkeypatch):
    monkeypatch.setattr("saes.engine.codes.PART", part)  # 1, 3, 7 of the 20 latents at a time, all
    torch.manual_seed(0)
    mask = torch.rand(9, 20) < 0.3
    mask[4], mask[:, 6] = False, False
    row, latent = mask.nonzero().T
    sparse, dense = SparseCodes(row, latent, 9, 20), DenseCodes(9, 20)
    V, W, X = torch.randn(9, 20) * mask, torch.randn(20, 5), torch.randn(9, 5)
    v = V[mask]
    torch.testing.assert_close(sparse.decode(v, W), dense.decode(V, W))
    torch.testing.assert_close(sparse.pair(X, W), dense.pair(X, W)[mask])
    torch.testing.assert_close(sparse.gather(v, X, torch.empty(20, 5)), dense.gather(V, X, torch.empty(20, 5)))
    torch.testing.assert_close(sparse.total(v), dense.total(V))
    torch.testing.assert_close(sparse.row_total(v), dense.row_total(V))
    assert torch.equal(sparse.take(W[:, 0]), dense.take(W[:, 0]).expand(9, 20)[mask])
    assert torch.equal(sparse.of_rows(X[:, 0]), dense.of_rows(X[:, 0]).expand(9, 20)[mask])
    parts = sparse.split((4, 20)).decode(v, W).view(9, 2, 5)
    torch.testing.assert_close(parts[:, 0], V[:, :4] @ W[:4])
    torch.testing.assert_close(parts.sum(1), V @ W)


def toy(n, seed):
    """Rows that are sums of a few of 24 directions."""
    torch.manual_seed(99)
    directions = torch.nn.functional.normalize(torch.randn(24, D), dim=-1)
    torch.manual_seed(seed)
    return ((torch.rand(n, 24) < 0.1) * torch.rand(n, 24)) @ directions * 4


AS_OURS = {
    "topk": TopKConfig(**TOP, dead_after=20, lr=3e-3),
    "batchtopk": BatchTopKConfig(**TOP, dead_after=20, lr=3e-3),
    "matryoshka": MatryoshkaConfig(**TOP, dead_after=20, levels=(8, 32, 64)),
    "jumprelu": JumpReLUConfig(**SMALL, l0_coefficient=0.3),
    "gated": GatedConfig(**SMALL, l1_coefficient=0.3),
}


@pytest.mark.xdist_group("saes")  # one worker imports sae_lens
@pytest.mark.parametrize("kind", list(AS_OURS))
def test_training_follows_sae_lens(kind, tmp_path):
    """Same start, same batches, same schedule: step for step the same losses, and the same held-out R2."""
    steps, config, batches, x = 160, AS_OURS[kind], toy(160 * ROWS, 0).split(ROWS), toy(2000, 1)
    ours = Trainer(config, D, batches[0].mean(0), steps, seed=3)
    trainer = sae_lens_trainer(ours)
    losses = []
    for batch in batches:
        loss = trainer.step(batch).loss.item()
        trainer.n_training_steps += 1
        losses.append((ours.step(batch), loss))
    for mine, loss in losses[:30]:
        assert mine == pytest.approx(loss, rel=1e-4)
    assert sum(a for a, _ in losses[-50:]) == pytest.approx(sum(b for _, b in losses[-50:]), rel=0.01)
    if kind in ("topk", "batchtopk", "matryoshka"):
        assert torch.equal(ours.dead.float().sum(), trainer.dead_neurons.sum().float())
    if kind == "topk":
        with torch.no_grad():
            expected = trainer.sae(x)
        found = read_weights(*inference(ours, 1.0), tmp_path)(x)
        assert abs(r2(x, found) - r2(x, expected)) < 0.002
        assert r2(x, found) > 0.5


@pytest.mark.parametrize("config", KINDS, ids=names)
def test_a_state_goes_on_exactly(config):
    _, x, y = setting(config)
    begin = {"config": config, "d_in": D, "b_dec": y.mean(0), "steps": 40}
    whole, part, rest = Trainer(**begin), Trainer(**begin), Trainer(**begin, seed=5)
    for _ in range(7):
        whole.step(x, y), part.step(x, y)
    tensors, numbers = part.state()
    rest.load_state({name: tensor.clone() for name, tensor in tensors.items()}, numbers)
    for _ in range(7):
        assert whole.step(x, y) == rest.step(x, y)
    assert whole.threshold == rest.threshold
    for name, weight in whole.weights.items():
        assert torch.equal(weight, rest.weights[name]), name


@pytest.mark.parametrize("config", KINDS, ids=names)
def test_a_nan_is_refused_before_it_is_learnt(config):
    _, x, y = setting(config)
    trainer = Trainer(config, D, y.mean(0), 40)
    trainer.step(x, y)
    before = {name: weight.clone() for name, weight in trainer.weights.items()}
    bad = x.clone()
    bad[3, 2] = float("nan")
    with pytest.raises(FloatingPointError):
        trainer.step(bad, bad if config.kind != "transcoder" else y)
    assert trainer.done == 1
    for name, weight in before.items():
        assert torch.equal(weight, trainer.weights[name])


@pytest.mark.parametrize("config", KINDS, ids=names)
def test_steps_off_the_cpu(config):
    """The path of a GPU: no tensor is left on the CPU, and its choices (another top-k) give the same training."""
    _, x, y = setting(config)
    here = Trainer(config, D, y.mean(0), 40)
    here.since_fired += torch.arange(WIDTH) % 2 * 1000  # some are dead: there is an auxiliary loss
    losses = [here.step(x, y) for _ in range(6)]
    with PretendDevice():
        there = Trainer(config, D, y.mean(0), 40, device=DEVICE)
        there.since_fired += torch.arange(WIDTH, device=DEVICE) % 2 * 1000
        x, y = x.to(DEVICE), y.to(DEVICE)
        found = [there.step(x, y) for _ in range(6)]
        weights = {name: weight.cpu() for name, weight in there.weights.items()}
        assert {weight.device.type for weight in there.state()[0].values()} == {DEVICE}
    assert found == pytest.approx(losses, rel=1e-4)
    for name, weight in here.weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4)


def test_the_pretended_device_refuses_a_mixture():
    with PretendDevice():
        there = torch.ones(3, device=DEVICE)
        assert (there * 2).sum().item() == 6
        with pytest.raises(AssertionError, match="two devices"):
            there + torch.ones(3)
        with pytest.raises((TypeError, RuntimeError)):
            there.numpy()


@pytest.mark.parametrize("config", KINDS, ids=names)
def test_the_same_steps_on_a_gpu(config):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    _, x, y = setting(config)
    here, there = Trainer(config, D, y.mean(0), 40), Trainer(config, D, y.mean(0), 40, device="cuda")
    for _ in range(10):
        assert there.step(x.cuda(), y.cuda()) == pytest.approx(here.step(x, y), rel=1e-4)
    for name, weight in here.weights.items():
        torch.testing.assert_close(there.weights[name].cpu(), weight, rtol=1e-3, atol=1e-4)


@pytest.mark.xdist_group("saes")
@pytest.mark.parametrize("kind", [TopKConfig, BatchTopKConfig, MatryoshkaConfig])
def test_no_slower_than_sae_lens_on_a_gpu(kind):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    config = kind(k=32, width=16 * 768, batch_size=4096)
    x = torch.randn(4096, 768, device="cuda")
    ours = Trainer(config, 768, x.mean(0), 1000, device="cuda")
    theirs = sae_lens_trainer(ours)
    seconds = {}
    for _ in range(5):  # the first ones warm up
        for name, trainer in (("ours", ours), ("theirs", theirs)):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(10):
                trainer.step(x)
            torch.cuda.synchronize()
            seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - start)
    assert seconds["ours"] <= seconds["theirs"]
