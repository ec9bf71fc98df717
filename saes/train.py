"""Train a sparse dictionary on one site of a store, with sae-lens's SAETrainer and our data order.

1. Scale: multiply the rows by sqrt(d) / mean norm, so that one learning rate suits every site.
2. Start `b_dec` at the data mean; every other weight as sae-lens starts it, from `seed`.
3. Step through (epoch, step) in the store's random order, checking that rows, loss and weights stay finite.
4. Fold the scale into the weights; write sae-lens's layout, our metrics, and the manifest.

sae-lens's own loop (`fit`) is left out, as its checkpoints are pickles and not atomic and a NaN passes unseen.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.activations import ActivationStore
from mechinterp.errors import NonFiniteError, StorageError, UsageError
from mechinterp.progress import progress
from mechinterp.storage import MANIFEST
from mechinterp.types import Placed, Site
from saes.checkpoint import CHECKPOINT, read_state, restore, same_run, save_state
from saes.config import BatchTopKConfig, SAEConfig, TopKConfig
from saes.dictionary import SparseDictionary
from saes.folder import load_sae, read_weights, save_sae
from saes.metrics import evaluate
from saes.null import untrained

__all__ = ["train_sae"]

MEASURED_ROWS = 2**16
"""The mean and the scale are measured on at most so many rows of the training split."""


def train_sae(store: ActivationStore, site: str | Site, config: SAEConfig, out: Path | str, seed: int = 0) -> Placed:
    """Train a dictionary on the training split of `site`, and write it to `out`.

    Args:
        store: the activations.
        site: which of its sites.
        config: `TopKConfig` or `BatchTopKConfig`.
        out: folder of the dictionary. A finished one of the same run is loaded, an interrupted one is resumed and
            ends in the same bytes as one that was never interrupted.
        seed: of the weights and of the data order.

    Raises:
        UsageError: the store lacks the site, or has no training rows.
        NonFiniteError: a row, the loss or a weight is NaN or infinite; names the images. The last checkpoint stays.
        StorageError: `out` holds something else, or cannot be written.
    """
    folder, site = Path(out), Site.parse(site)
    asked = {"site": str(site), "config": config.to_dict(), "seed": seed, "store": store.sha256}
    if (folder / MANIFEST).exists():
        return _finished(folder, asked)
    data = _Data(store, site, config, seed)
    trainer, start = _start(folder, asked, data)
    _run(trainer, data, start, folder, asked)
    cfg, weights = _inference(trainer, data)
    placed = Placed.sae(read_weights(cfg, weights, folder), site)
    save_sae(folder, cfg, weights, {**asked, **_about(placed, data, trainer)})
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return load_sae(folder)


class _Data:
    """The training rows in order, scaled; remembers which images a batch came from."""

    def __init__(self, store: ActivationStore, site: Site, config: SAEConfig, seed: int):
        self.store, self.site, self.config, self.seed = store, site, config, seed
        self.activations = store.site(site)
        count = len(store.rows(site, "train"))
        if count == 0:
            raise UsageError("has no row in the training split", where=str(store.folder))
        self.batch_size = min(config.batch_size, count)
        self.steps_per_epoch = count // self.batch_size
        self.steps = self.steps_per_epoch * config.epochs
        self.rows = np.empty(0, np.int64)
        measured = np.sort(self._order(0)[:MEASURED_ROWS])
        self.mean, self.scale = self._measure(measured)

    def _order(self, epoch: int) -> np.ndarray:
        return self.store.order(self.site, seed=self.seed, epoch=epoch, split="train")

    def _measure(self, rows: np.ndarray) -> tuple[Float[Tensor, " d"], float]:
        """Mean of the given rows, and what brings their mean norm to sqrt(d)."""
        total, norm = torch.zeros(self.activations.d, dtype=torch.float64), 0.0
        for start in range(0, len(rows), 8192):
            self.rows = rows[start : start + 8192]
            x = self.activations[self.rows]
            self.check(x)
            total += x.double().sum(0)
            norm += x.double().norm(dim=-1).sum().item()
        if norm == 0:
            raise UsageError("every row is zero", where=str(self.site), hint="choose another site")
        return (total / len(rows)).float(), self.activations.d**0.5 * len(rows) / norm

    def check(self, x: Tensor) -> None:
        """Raise NonFiniteError, naming the images, when a row of the current batch is not finite."""
        finite = torch.isfinite(x).all(-1)
        if not finite.all():
            bad = self.rows[~finite.numpy()]
            raise NonFiniteError(
                "activations are not finite", images=self.store.images_of(self.site, bad), where=str(self.site)
            )

    def images(self) -> list[str]:
        """Names of the images in the current batch."""
        return self.store.images_of(self.site, self.rows)

    def batches(self, start: int) -> Iterator[Float[Tensor, "batch d"]]:
        """Scaled batches from global step `start` on; the batch at a step never depends on where one began."""
        order, epoch = np.empty(0, np.int64), -1
        for step in range(start, self.steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self._order(epoch)
            first = (step % self.steps_per_epoch) * self.batch_size
            self.rows = order[first : first + self.batch_size]
            x = self.activations[self.rows]
            self.check(x)
            yield x * self.scale


def _finished(folder: Path, asked: dict[str, Any]) -> Placed:
    """Load a finished dictionary if it is the one that is asked for."""
    placed = load_sae(folder)
    assert isinstance(placed.dictionary, SparseDictionary)
    if not same_run({name: placed.dictionary.info.get(name) for name in asked}, asked):
        raise StorageError("holds a dictionary of another run", where=str(folder), hint="choose another folder")
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return placed


def _start(folder: Path, asked: dict[str, Any], data: _Data) -> tuple[Any, int]:
    """Build the trainer and bring it to where the last checkpoint left it. Returns it and the next global step."""
    checkpoint = folder / CHECKPOINT
    if folder.is_dir():
        known = {"cfg.json", "sae_weights.safetensors", "mechinterp.json", CHECKPOINT}
        present = {path.name for path in folder.iterdir() if path == checkpoint or path.suffix != ".partial"}
        if present - known or (present and not checkpoint.exists()):
            raise StorageError("is not empty and holds no run of ours", where=str(folder), hint="choose another folder")
        for path in folder.glob("*.partial"):
            if path != checkpoint:
                path.unlink(missing_ok=True)
    trainer = _trainer(data)
    if not checkpoint.exists():
        save_state(checkpoint, trainer, asked)  # claims the folder for this run
        return trainer, 0
    tensors, rest = read_state(checkpoint)
    if not same_run(rest.get("extra"), asked):
        raise StorageError("holds a checkpoint of another run", where=str(folder), hint="choose another folder")
    restore(trainer, tensors, rest)
    return trainer, trainer.n_training_steps


def _trainer(data: _Data) -> Any:
    """A sae-lens SAETrainer for our data, its weights seeded and its `b_dec` at the data mean."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config, steps = data.config, data.steps
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.seed)
        sae = _fresh(config, data)
    with torch.no_grad():
        sae.b_dec.copy_(data.mean * data.scale)
    warm_up, decay = steps // 20, steps // 5
    trainer_config = SAETrainerConfig(
        total_training_samples=steps * data.batch_size,
        train_batch_size_samples=data.batch_size,
        lr=config.lr,
        lr_end=config.lr,
        lr_warm_up_steps=warm_up if warm_up > 1 else 0,
        lr_decay_steps=decay,
        dead_feature_window=config.dead_after,
        feature_sampling_window=steps + 1,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(trainer_config, sae, iter(()))


def _fresh(config: SAEConfig, data: _Data) -> Any:
    """A sae-lens training SAE with its own initial weights."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig

    shape = {"d_in": data.activations.d, "d_sae": config.width, "normalize_activations": "none"}
    match config:
        case TopKConfig():
            return TopKTrainingSAE(TopKTrainingSAEConfig(k=config.k, **shape))
        case BatchTopKConfig():
            # the threshold starts at 0 and follows a running mean: a short run needs a faster one to arrive
            rate = min(0.5, max(0.01, 10 / data.steps))
            return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=config.k, topk_threshold_lr=rate, **shape))
        case _:
            assert_never(config)


def _run(trainer: Any, data: _Data, start: int, folder: Path, asked: dict[str, Any]) -> None:
    """Train from global step `start` to the end, with a checkpoint every `checkpoint_every` steps."""
    trainer.data_provider = data.batches(start)
    for step in progress(range(start, data.steps), f"train {data.site}", unit="step"):
        output = trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1
        if not torch.isfinite(output.loss):
            raise NonFiniteError(f"the loss at step {step} is not finite", images=data.images(), where=str(data.site))
        if (step + 1) % data.config.checkpoint_every == 0 and step + 1 < data.steps:
            _check_weights(trainer, data, step)
            save_state(folder / CHECKPOINT, trainer, asked)
    _check_weights(trainer, data, data.steps)


def _check_weights(trainer: Any, data: _Data, step: int) -> None:
    for name, weight in trainer.sae.state_dict().items():
        if not torch.isfinite(weight).all():
            raise NonFiniteError(f"{name} is not finite at step {step}", images=data.images(), where=str(data.site))


def _inference(trainer: Any, data: _Data) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """sae-lens's inference configuration and weights, for rows as they are stored: the scale is folded in.

    Decoder rows leave with unit norm, so a latent's activation is the length of what it adds to the row.
    """
    sae = trainer.sae
    sae.fold_activation_norm_scaling_factor(data.scale)
    weights = sae.state_dict()
    sae.process_state_dict_for_saving_inference(weights)
    cfg = sae.cfg.get_inference_sae_cfg_dict()
    if "rescale_acts_by_decoder_norm" in cfg:
        cfg["rescale_acts_by_decoder_norm"] = False  # folded above; the norms are 1
    cfg["metadata"] |= {"hook_name": str(data.site), "model_name": data.store.request.model["family"]}
    return cfg, {name: tensor.detach().clone() for name, tensor in weights.items()}


def _about(placed: Placed, data: _Data, trainer: Any) -> dict[str, Any]:
    """What mechinterp.json says beside the request: where it stands, how good it is, how good chance is."""
    splits = [split for split in ("val", "test", "train") if len(data.store.rows(data.site, split))]
    twin = Placed.sae(untrained(data.config, data.activations.d, data.seed, data.mean), data.site)
    return {
        "kind": "sae",
        "reads": str(placed.reads),
        "writes": str(placed.writes),
        "tokens": data.store.request.tokens,
        "model": data.store.request.model,
        "data": data.store.request.data,
        "steps": data.steps,
        "scale": data.scale,
        "metrics": evaluate(placed, data.store, splits[0]).to_dict(),
        "metrics_untrained": evaluate(twin, data.store, splits[0]).to_dict(),
        "sae_lens": trainer.sae.cfg.metadata.sae_lens_training_version,
    }
