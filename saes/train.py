"""Train sparse dictionaries on a store, in its order, so that an interrupted run ends in the bytes of a whole one.

1. Scale: multiply the rows by sqrt(d) / mean norm, so that one learning rate suits every site.
2. Start `b_dec` at the data mean and the other weights as sae-lens does, from `seed`.
3. Step through (epoch, step) in the store's random order, checking that rows, loss and gradients stay finite.
4. Fold the scale into the weights; write sae-lens's layout, our metrics, and the manifest.

The steps are our own (`saes.engine`): sae-lens's trainer is slow on a CPU, writes pickles, and passes a NaN on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mechinterp.activations import ActivationStore
from mechinterp.errors import NonFiniteError, StorageError, UsageError
from mechinterp.progress import progress
from mechinterp.storage import MANIFEST
from mechinterp.types import Placed, Site
from saes.checkpoint import CHECKPOINT, restore, same_run, save_state
from saes.config import SAEConfig, TrainConfig, TranscoderConfig
from saes.dictionary import SparseDictionary
from saes.engine.data import TrainingData
from saes.engine.inference import inference, layout_version
from saes.engine.trainer import Trainer
from saes.folder import CFG, INFO, WEIGHTS, load_sae, read_weights, save_sae
from saes.metrics import evaluate
from saes.null import untrained
from saes.tokens import rows_for

__all__ = ["Run", "train_sae", "train_together", "train_transcoder"]


def train_sae(
    store: ActivationStore,
    site: str | Site,
    config: SAEConfig,
    out: Path | str,
    seed: int = 0,
    tokens: str | None = None,
    device: str = "cpu",
) -> Placed:
    """Train a dictionary on the training split of `site`, and write it to `out`.

    Args:
        store: the activations.
        site: which of its sites.
        config: `TopKConfig`, `BatchTopKConfig`, `MatryoshkaConfig`, `JumpReLUConfig` or `GatedConfig`.
        out: folder of the dictionary. A finished one of the same run is loaded, an interrupted one is resumed and
            ends in the same bytes as one that was never interrupted.
        seed: of the weights and of the data order.
        tokens: train on rows of one kind (patch, cls, pooled, text) only. Default: on every row of the store, whose
            own choice of tokens is what the dictionary then records. Where a language model's store holds image tokens
            and words, it must be said: one of them, or "all".
        device: where the steps run, for example "cuda". Results differ in the last bits between devices.

    Raises:
        UsageError: the store lacks the site, or has no training rows, or none of the kind.
        NonFiniteError: a row, the loss or a gradient is NaN or infinite; names the images. The last checkpoint stays.
        StorageError: `out` holds something else, or cannot be written.
    """
    run = Run(store, site, site, config, Path(out), seed, tokens, device)
    train_together([run])
    return load_sae(run.folder)


def train_transcoder(
    store: ActivationStore,
    reads: str | Site,
    writes: str | Site,
    config: TranscoderConfig,
    out: Path | str,
    seed: int = 0,
    tokens: str | None = None,
    device: str = "cpu",
) -> Placed:
    """Train a transcoder from one site of a store to another; arguments and errors as in `train_sae`.

    For an MLP, read `...blocks.L.ln2.hook_normalized` and write `...blocks.L.hook_mlp_out`.
    """
    run = Run(store, reads, writes, config, Path(out), seed, tokens, device)
    train_together([run])
    return load_sae(run.folder)


class Run:
    """One dictionary on its way: what was asked for, its folder, its data and its trainer."""

    def __init__(
        self,
        store: ActivationStore,
        reads: str | Site,
        writes: str | Site,
        config: TrainConfig,
        folder: Path,
        seed: int,
        tokens: str | None,
        device: str,
    ):
        self.store, self.config, self.folder, self.seed, self.device = store, config, folder, seed, device
        self.reads, self.writes = Site.parse(reads), Site.parse(writes)
        self.tokens = tokens or store.request.tokens
        held = [str(kind) for kind in sorted(store.index_of(self.reads)["kind"].unique())]
        if tokens is None and self.reads.tower == "text" and len(held) > 1:
            hint = f"say which with tokens: {', '.join(held)}, or all"
            raise UsageError(f"holds {' and '.join(held)} tokens at {self.reads}", where=str(store.folder), hint=hint)
        transcodes = isinstance(config, TranscoderConfig)
        if transcodes != (self.reads != self.writes):
            hint = "a transcoder has two, and a TranscoderConfig; an SAE has one"
            raise UsageError(f"reads {self.reads} and writes {self.writes}", where=type(config).__name__, hint=hint)
        where = {"reads": str(self.reads), "writes": str(self.writes)} if transcodes else {"site": str(self.reads)}
        self.asked = {**where, "config": config.to_dict(), "seed": seed, "store": store.sha256, "tokens": self.tokens}
        self.data: TrainingData
        self.trainer: Trainer

    @property
    def finished(self) -> bool:
        """Whether the folder holds the dictionary that is asked for. Raises StorageError for another one."""
        if not (self.folder / MANIFEST).exists():
            return False
        dictionary = load_sae(self.folder).dictionary
        assert isinstance(dictionary, SparseDictionary)
        if not same_run({name: dictionary.info.get(name) for name in self.asked}, self.asked):
            raise StorageError(
                "holds a dictionary of another run", where=str(self.folder), hint="choose another folder"
            )
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        return True

    def open(self) -> None:
        """Make the trainer and bring it to where the last checkpoint left it."""
        checkpoint = self.folder / CHECKPOINT
        _check_folder(self.folder)
        config = self.config
        share = config.least_share if isinstance(config, TranscoderConfig) else 0.0
        self.data = TrainingData(
            self.store, self.reads, self.writes, self.tokens, config.batch_size, config.epochs, self.seed, share
        )
        data = self.data
        self.trainer = Trainer(
            config, data.source.d, data.mean_out * data.scale_out, data.steps, self.seed, self.device
        )
        if checkpoint.exists():
            restore(checkpoint, self.trainer, self.asked)
        else:
            self.save()  # claims the folder for this run

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Train on a batch, with a checkpoint every `checkpoint_every` steps."""
        step = self.trainer.done
        try:
            self.trainer.step(x.to(self.device), y.to(self.device))
        except FloatingPointError as error:
            raise NonFiniteError(f"{error}, at step {step}", images=self.data.images(), where=str(self.reads)) from None
        if (step + 1) % self.config.checkpoint_every == 0 and step + 1 < self.data.steps:
            self.save()

    def save(self) -> None:
        """Write the checkpoint."""
        save_state(self.folder / CHECKPOINT, self.trainer, self.asked)

    def close(self) -> None:
        """Write the dictionary with what is known of it, and drop the checkpoint."""
        data = self.data
        mean, scale_out = (data.mean, data.scale_out) if data.transcodes else (None, None)
        cfg, weights = inference(self.trainer, data.scale, mean, scale_out)
        cfg["metadata"] |= {"hook_name": str(self.reads), "model_name": self.store.request.model["family"]}
        if data.transcodes:
            cfg["metadata"]["hook_name_out"] = str(self.writes)
        placed = Placed(read_weights(cfg, weights, self.folder, {"token_kinds": data.kinds}), self.reads, self.writes)
        save_sae(self.folder, cfg, weights, {**self.asked, **self._about(placed)})
        (self.folder / CHECKPOINT).unlink(missing_ok=True)

    def _about(self, placed: Placed) -> dict[str, Any]:
        """What mechinterp.json says beside the request: where it stands, how good it is, how good chance is."""
        data, store = self.data, self.store
        split = next(split for split in ("val", "test", "train") if len(rows_for(placed, store, split)))
        scores = evaluate(placed, store, split)
        k = None if hasattr(self.config, "k") else max(1, min(round(scores.l0), self.config.width))
        null = untrained(self.config, data.source.d, self.seed, data.mean, k=k, mean_out=data.mean_out)
        null.info["token_kinds"] = data.kinds
        twin = replace(placed, dictionary=null)
        return {
            "kind": "transcoder" if data.transcodes else "sae",
            "reads": str(self.reads),
            "writes": str(self.writes),
            "token_kinds": data.kinds,
            "model": store.request.model,
            "data": store.request.data,
            "steps": data.steps,
            "scale": data.scale,
            "metrics": scores.to_dict(),
            "metrics_untrained": evaluate(twin, store, split).to_dict(),
            "sae_lens": layout_version(),
        }


def _check_folder(folder: Path) -> None:
    """Raise StorageError if a folder holds something else than an interrupted run; sweep up half-written files."""
    if not folder.is_dir():
        return
    checkpoint = folder / CHECKPOINT
    present = {path.name for path in folder.iterdir() if path == checkpoint or path.suffix != ".partial"}
    if present - {CFG, WEIGHTS, INFO, CHECKPOINT} or (present and not checkpoint.exists()):
        raise StorageError("is not empty and holds no run of ours", where=str(folder), hint="choose another folder")
    for path in folder.glob("*.partial"):
        if path != checkpoint:
            path.unlink(missing_ok=True)


def train_together(runs: Sequence[Run]) -> None:
    """Bring runs that see the same batches to their ends in one pass over the data; finished ones are left alone."""
    runs = [run for run in runs if not run.finished]
    for run in runs:
        run.open()
    if not runs:
        return
    data = max(runs, key=lambda run: run.data.steps).data
    first = min(run.trainer.done for run in runs)
    what = f"train {data.reads}" + (f" ({len(runs)} dictionaries)" if len(runs) > 1 else "")
    batches = data.batches(first)
    for step in progress(range(first, data.steps), what, unit="step"):
        x, y = next(batches)
        for run in runs:
            if run.trainer.done == step < run.data.steps:
                run.data.rows = data.rows
                run.step(x, y)
    for run in runs:
        run.close()
