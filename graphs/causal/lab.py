"""One image, one model, many interventions: the true model, with as much of it held as the mode says.

| mode          | patterns | norm scales | MLP outputs                      | answers                                |
|---------------|----------|-------------|----------------------------------|----------------------------------------|
| `direct`      | held     | held        | held, plus `(v - a) d`           | is an edge what its removal does?      |
| `replacement` | held     | held        | features recomputed, errors held | what the local replacement model says  |
| `frozen_attn` | held     | free        | recomputed by the MLP            | all but the attention patterns         |
| `free`        | free     | free        | recomputed by the MLP            | what the model does (the headline)     |

In every mode `out := out + (v - a) d` at `hook_mlp_out`, with `a` the activation that the feature has in that very
pass; so what the dictionary does not explain stays in the model. Interventions run together, as rows of one batch.

For SAEs all of it happens at `hook_resid_post`: the stream is held there, or its features are recomputed, after they
have been read. Where scales are held MLPs are linear, their gates held too, as in a graph of SAEs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from graphs.causal.changes import Change, FeatureAt
from graphs.causal.legs import Leg, legs_of, read_outputs
from graphs.causal.sites import (
    Hooks,
    Mode,
    by_block,
    edits_of,
    hold,
    keep,
    leaves,
    linear_bridge,
    linear_mlp,
    only_hooks,
    site_hooks,
    spread,
)
from graphs.frozen.parts import FrozenMLP, FrozenPass, Readout
from graphs.targets import Feature, Output
from mechinterp.errors import NonFiniteError, UsageError
from mechinterp.models import HookedVLM
from mechinterp.types import ImageTextBatch, Placed

__all__ = ["Lab", "Outcome"]

_KEPT = ("attn.hook_pattern", "hook_scale", "hook_mlp_out", "hook_resid_mid", "hook_resid_post", "hook_normalized")


@dataclass(frozen=True)
class Outcome:
    """What came of the interventions, one row each.

    Fields:
        outputs: the outputs, in the order of the lab's (of the readouts in mode `direct`).
        pre, acts: pre-activations and activations of the watched features.
        kept: other values that were asked for, by hook name.
    """

    outputs: Float[Tensor, "change output"]
    pre: Float[Tensor, "change watched"]
    acts: Float[Tensor, "change watched"]
    kept: dict[str, Float[Tensor, "change _pos _d"]]


class Lab:
    """A model with one image in it, ready for interventions.

    Args:
        model: the model.
        batch: one image (with the prompt, for a generative model).
        dictionaries: transcoders, or SAEs of the residual stream, as for the graph.
        outputs: what is measured, as for the graph.
        frozen: the pass that the graph was made from. Mode `direct` needs it, and `replacement` for SAEs and where
            there is a projector.
        chunk: interventions that run together.
    """

    def __init__(
        self,
        model: HookedVLM,
        batch: ImageTextBatch,
        dictionaries: Sequence[Placed],
        outputs: Sequence[Output],
        frozen: FrozenPass | None = None,
        chunk: int = 64,
    ):
        if len(batch) != 1:
            raise UsageError(f"{len(batch)} images", where="Lab", hint="one at a time")
        self.model, self.batch, self.frozen, self.chunk = model, batch, frozen, chunk
        self.outputs = tuple(outputs)
        self.placed = {(p.writes.tower, p.writes.layer): p for p in dictionaries}
        self.in_stream = any(p.reads == p.writes for p in dictionaries)
        self.legs = legs_of(model, batch, self.outputs)
        self.clean: dict[str, dict[str, Tensor]] = {}
        self._results: dict[str, Tensor] = {}
        for leg in self.legs:
            self.clean[leg.name] = kept = {}
            with torch.no_grad(), self.model.hooks(fwd_hooks=keep(self._names(leg), kept)):
                self._results[leg.name] = leg.run(1)
        self._features = [FeatureAt(o.tower, o.layer, o.pos, o.index) for o in self.outputs if isinstance(o, Feature)]
        pre, _ = self._watched(self._features, self.clean, 1)
        self.values = self._read(self._results, pre, 1)[0].detach()

    def dictionary(self, feature: FeatureAt) -> Placed:
        """The dictionary that a feature belongs to. Raises UsageError when there is none at its block."""
        found = self.placed.get((feature.tower.split(".")[0], feature.layer))
        if found is None:
            raise UsageError(f"no dictionary at block {feature.layer} of {feature.tower}", where="dictionaries")
        return found

    def leg_of(self, tower: str) -> Leg:
        """The part of the model that a tower of the graph runs in."""
        for leg in self.legs:
            if tower in leg.towers:
                return leg
        raise UsageError(f"nothing runs a tower {tower!r}", where="Lab", hint=str([leg.towers for leg in self.legs]))

    def clean_state(self, watch: Sequence[FeatureAt]) -> tuple[Float[Tensor, " watched"], Float[Tensor, " watched"]]:
        """Pre-activations and activations in the clean pass."""
        pre, acts = self._watched(watch, self.clean, 1)
        return pre[0], acts[0]

    @torch.no_grad()
    def run(
        self,
        changes: Sequence[Change],
        mode: Mode = "free",
        watch: Sequence[FeatureAt] = (),
        names: Sequence[str] = (),
    ) -> Outcome:
        """Do each change by itself, starting from the clean input. `names`: hook names whose values are returned too.

        Raises NonFiniteError when an output is no longer a number.
        """
        if not changes:
            raise UsageError("no changes", where="Lab.run")
        for feature in {FeatureAt(f.tower, f.layer, 0, 0) for change in changes for f in change.features}:
            self.dictionary(feature)  # these say what is missing
            self.leg_of(feature.tower)
        rows = [self._some(changes[i : i + self.chunk], mode, watch, names) for i in range(0, len(changes), self.chunk)]
        outputs, pre, acts = (torch.cat([getattr(r, k) for r in rows]) for k in ("outputs", "pre", "acts"))
        if not torch.isfinite(outputs).all():
            raise NonFiniteError("outputs are not finite", where=f"Lab.run, {mode}", images=list(self.batch.ids))
        return Outcome(outputs, pre, acts, {name: torch.cat([r.kept[name] for r in rows]) for name in names})

    def effects(self, changes: Sequence[Change], mode: Mode = "free") -> Float[Tensor, "change output"]:
        """Outputs after each change, minus the clean ones."""
        clean = self.readout_values if mode == "direct" else self.values
        return self.run(changes, mode).outputs - clean

    def gradients(self, features: Sequence[FeatureAt]) -> Float[Tensor, "feature output"]:
        """Gradient of each output at each feature's place, times what the feature writes there: one backward pass."""
        points: dict[str, dict[str, Tensor]] = {}
        seen: dict[str, dict[str, Tensor]] = {}
        results: dict[str, Tensor] = {}
        reads = {str(self.dictionary(f).reads) for f in self._features}
        writes = {str(placed.writes) for placed in self.placed.values()}
        with torch.enable_grad():
            for leg in self.legs:
                points[leg.name], seen[leg.name] = {}, {}
                sites = [name for name in self.clean[leg.name] if name in writes]
                here = reads & self.clean[leg.name].keys()
                hooks = leaves(sites, points[leg.name]) + keep(here, seen[leg.name], gradient=True)
                with self.model.hooks(fwd_hooks=hooks):
                    results[leg.name] = leg.run(1)
            pre, _ = self._watched(self._features, seen, 1)
            values = self._read(results, pre, 1)[0]
            flat = [(leg, site) for leg in points for site in points[leg]]
            grads = [
                torch.autograd.grad(v, [points[a][b] for a, b in flat], retain_graph=True, allow_unused=True)
                for v in values
            ]
        found = torch.zeros(len(features), len(values), dtype=torch.float64)
        _, acts = self.clean_state(features)
        for row, feature in enumerate(features):
            placed = self.dictionary(feature)
            at = flat.index((self.leg_of(feature.tower).name, str(placed.writes)))
            wrote = (acts[row] * placed.dictionary.W_dec[feature.index]).double()
            for column, per_output in enumerate(grads):
                gradient = per_output[at]
                found[row, column] = 0.0 if gradient is None else gradient[0, feature.pos].double() @ wrote
        return found

    @torch.no_grad()
    def activations(self) -> dict[tuple[str, int], Float[Tensor, "pos d_sae"]]:
        """All activations of the clean pass, by tower of the graph and layer."""
        found = {}
        for leg in self.legs:
            for tower in leg.towers:
                for (name, layer), placed in self.placed.items():
                    if name == tower.split(".")[0] and layer is not None:
                        x = self.clean[leg.name][str(placed.reads)][0]
                        found[tower, layer] = placed.dictionary.encode(x.to(placed.dictionary.W_enc.dtype))
        return found

    @torch.no_grad()
    def only(
        self,
        kept: Sequence[Iterable[FeatureAt] | None],
        other: dict[tuple[str, int], Float[Tensor, "pos d_sae"]] | None = None,
    ) -> Float[Tensor, "set output"]:
        """Outputs of the model, nothing held, with all features ablated except for those of each set (None: all kept).

        `other`: `activations()` of another image, for resample ablation; else features go to 0. Errors are not touched.
        """
        n = len(kept)
        masks = {key: torch.zeros(n, *acts.shape, dtype=torch.bool) for key, acts in self.activations().items()}
        for row, features in enumerate(kept):
            if features is None:
                for mask in masks.values():
                    mask[row] = True
                continue
            for f in features:
                masks[f.tower, f.layer][row, f.pos, f.index] = True
        results = {}
        for leg in self.legs:
            hooks: Hooks = []
            for (tower, layer), mask in masks.items():
                if tower in leg.towers:
                    placed = self.placed[tower.split(".")[0], layer]
                    hooks += only_hooks(
                        str(placed.writes), placed, mask, None if other is None else other[tower, layer]
                    )
            with self.model.hooks(fwd_hooks=hooks):
                results[leg.name] = leg.run(n)
        if self._features:
            raise UsageError("a feature as output cannot be ablated around", where="outputs", hint="use a logit")
        return self._read(results, torch.zeros(n, 0), n)

    @property
    def readout_values(self) -> Float[Tensor, " readout"]:
        """The clean outputs as the frozen pass has them: the halves of a similarity are outputs of their own."""
        return torch.tensor([r.value for r in self._frozen().readouts], dtype=torch.float64)

    def _frozen(self) -> FrozenPass:
        if self.frozen is None:
            raise UsageError("this mode needs the frozen pass", where="Lab", hint="Lab(..., frozen=freeze(...))")
        return self.frozen

    def _names(self, leg: Leg) -> list[str]:
        """What is kept of the clean pass."""
        towers = {tower.split(".")[0] for tower in leg.towers}
        found = [n for n in self.model.hook_dict if n.split(".")[0] in towers and n.endswith(_KEPT)]
        return found + ["projector.hook_out"] * (len(towers) > 1)

    def _some(self, changes: Sequence[Change], mode: Mode, watch: Sequence[FeatureAt], names: Sequence[str]) -> Outcome:
        n = len(changes)
        every = [*watch, *self._features]
        reads = {str(self.dictionary(f).reads) for f in every}
        early = reads if self.in_stream and mode in ("direct", "replacement") else set()  # read before it is replaced
        wanted = reads | set(names)
        if mode == "direct":
            wanted |= {self._stream_name(r) for r in self._frozen().readouts}
        results: dict[str, Tensor] = {}
        seen: dict[str, dict[str, Tensor]] = {}
        read: dict[str, dict[str, Tensor]] = {}
        for leg in self.legs:
            clean = self.clean[leg.name]
            mine = [i for i, change in enumerate(changes) if any(f.tower in leg.towers for f in change.features)]
            kept: dict[str, Tensor] = {}
            came: dict[str, Tensor] = {}
            if mine:
                hooks = keep(sorted(early & clean.keys()), came) + self._hooks(leg, [changes[i] for i in mine], mode)
                hooks += keep(sorted(wanted & clean.keys()), kept)
                with self.model.hooks(fwd_hooks=hooks):
                    kept["result"] = leg.run(len(mine))
            whole = {"result": self._results[leg.name]} | {name: clean[name] for name in wanted & clean.keys()}
            seen[leg.name] = {name: spread(value, kept.get(name), mine, n) for name, value in whole.items()}
            read[leg.name] = seen[leg.name] | {name: spread(clean[name], x, mine, n) for name, x in came.items()}
            results[leg.name] = seen[leg.name].pop("result")
        pre, acts = self._watched(every, read, n)
        outputs = self._read_frozen(seen, n) if mode == "direct" else self._read(results, pre[:, len(watch) :], n)
        asked = {name: next(k[name] for k in seen.values() if name in k) for name in names}
        return Outcome(outputs, pre[:, : len(watch)], acts[:, : len(watch)], asked)

    def _hooks(self, leg: Leg, changes: Sequence[Change], mode: Mode) -> Hooks:
        n, clean = len(changes), self.clean[leg.name]
        hooks: Hooks = []
        if mode != "free":
            held = ("hook_pattern",) if mode == "frozen_attn" else ("hook_pattern", "hook_scale")
            hooks += [(name, hold(value, n)) for name, value in clean.items() if name.endswith(held)]
        for name, value in clean.items():
            if not name.endswith("hook_mlp_out"):
                continue
            tower, _, layer, _ = name.split(".")
            placed = self.placed.get((tower, int(layer)))
            edits = edits_of(changes, leg.towers, tower, int(layer))
            if self.in_stream and mode in ("direct", "replacement"):
                hooks += linear_mlp(f"{tower}.blocks.{layer}", self._mlp(leg, tower, int(layer)), clean)
            if placed is not None:
                at, reads = str(placed.writes), str(placed.reads)
                hooks += site_hooks(at, placed, edits, mode, clean[reads], clean[at])
            elif not self.in_stream:
                hooks += site_hooks(name, None, edits, mode, value, value)
        if mode in ("direct", "replacement") and "projector.hook_out" in clean:
            bridge = next(s.bridge for s in self._frozen().stacks if s.bridge is not None)
            hooks += linear_bridge(bridge, clean)
        return hooks

    def _mlp(self, leg: Leg, tower: str, layer: int) -> FrozenMLP:
        """The MLP of a block of a leg with its gate held."""
        mine = (s for s in self._frozen().stacks if s.tower in leg.towers and s.tower.split(".")[0] == tower)
        return next(mine).blocks[layer].mlp

    def _watched(
        self, watch: Sequence[FeatureAt], seen: dict[str, dict[str, Tensor]], n: int
    ) -> tuple[Float[Tensor, "change watched"], Float[Tensor, "change watched"]]:
        """Pre-activations and activations of features, from what their dictionaries read."""
        dtype = torch.float64 if self.model.hf.dtype == torch.float64 else torch.float32
        pre, acts = torch.zeros(n, len(watch), dtype=dtype), torch.zeros(n, len(watch), dtype=dtype)
        for (tower, _), columns in by_block(watch).items():
            placed = self.dictionary(watch[columns[0]])
            d: Any = placed.dictionary
            x = seen[self.leg_of(tower).name][str(placed.reads)].to(d.W_enc.dtype)
            pos, which = torch.unique(torch.tensor([watch[i].pos for i in columns]), return_inverse=True)
            index = torch.tensor([watch[i].index for i in columns])
            acts[:, columns] = d.encode(x[:, pos])[:, which, index].to(dtype)
            centred = x - d.b_dec if getattr(d, "centred", placed.reads == placed.writes) else x
            linear = torch.einsum("nwd,dw->nw", centred[:, pos[which]], d.W_enc[:, index]) + d.b_enc[index]
            pre[:, columns] = linear.to(dtype)
        return pre, acts

    def _stream_name(self, readout: Readout) -> str:
        stack = self._frozen().stacks[readout.stack]
        return f"{stack.tower.split('.')[0]}.blocks.{stack.blocks[readout.layer].layer}.hook_resid_{readout.point}"

    def _read_frozen(self, seen: dict[str, dict[str, Tensor]], n: int) -> Float[Tensor, "change readout"]:
        columns = []
        for readout in self._frozen().readouts:
            leg = self.leg_of(self._frozen().stacks[readout.stack].tower)
            name = self._stream_name(readout)
            moved = seen[leg.name][name].double() - self.clean[leg.name][name].double()
            columns.append(readout.value + (moved * readout.seed).sum((1, 2)))
        return torch.stack(columns, dim=1)

    def _read(self, results: dict[str, Tensor], pre: Tensor, n: int) -> Float[Tensor, "change output"]:
        feature, other = iter(pre.T), iter(read_outputs(self.model, self.outputs, self.legs, results))
        columns = [next(feature if isinstance(output, Feature) else other).double() for output in self.outputs]
        return torch.stack([column.expand(n) for column in columns], dim=1)
