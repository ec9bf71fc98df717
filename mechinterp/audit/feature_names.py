"""Names for the features of a graph: proposed on train and val patients, proven on test patients, kept in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mechinterp.audit.dictionary import model_folder
from mechinterp.data import ImageData
from mechinterp.errors import DataError
from mechinterp.models import HookedVLM
from mechinterp.models.tables import Generative
from mechinterp.storage import read_json
from mechinterp.types import FeatureId, Placed

__all__ = ["FILE", "name_transcoders", "stored_names"]

FILE = "names.json"


def name_transcoders(model: HookedVLM, data: ImageData, placed: Sequence[Placed], seed: int = 0) -> dict[str, Any]:
    """Name what stands at each site after an attribute of the data, by the rules of `saes.naming`.

    The activation of a feature in an image is the largest over its tokens. Only towers that see the image are named.

    Returns, as JSON: `names` from feature to name, detection AUROC on test patients and its 95 % interval; `sites` with
    the number of live and of named features beside those of an untrained twin.

    Raises DataError without test patients, or without train and val patients.
    """
    from saes.gallery.observe import choose_rows, observe
    from saes.naming import attribute_concepts, name_features

    rows = choose_rows(data, seed)
    test = np.asarray(data.split[rows] == "test")
    if not test.any() or test.all():
        raise DataError("has no test patients, or only those", where=data.name, hint="names need both sides of a split")
    generates = isinstance(model.table.head, Generative)
    asked = [next(iter(data.targets.values()))] if generates else []
    concepts = attribute_concepts(data, rows, test)
    names, sites = {}, {}
    for one in placed:
        if one.reads.tower != "vision" and not generates:
            continue
        seen = observe(model, data, one, rows, asked, "all", seed)
        naming = name_features(seen.strongest, concepts, seen.patients, test, *seen.twins, seed=seed)
        for found in naming.named:
            low, high = found.ci95
            names[str(FeatureId(one.writes, found.feature))] = {
                "name": found.name,
                "auroc": round(found.auroc, 4),
                "ci95": [round(low, 4), round(high, 4)],
            }
        sites[str(one.writes)] = {
            "live": len(naming.names),
            "named": len(naming.named),
            "untrained_live": naming.decoys,
            "untrained_named": naming.decoys_named,
        }
    test_patients = len(set(np.asarray(data.patients)[rows][test]))
    return {"data": data.name, "images": len(rows), "test_patients": test_patients, "names": names, "sites": sites}


def stored_names(model: HookedVLM) -> dict[str, str]:
    """Names by feature ("vision.blocks.2.hook_mlp_out:17") that are stored beside a model; {} where there are none."""
    folder = model_folder(model)
    path = Path(folder) / "transcoders" / FILE if folder else None
    if path is None or not path.is_file():
        return {}
    said = read_json(path)
    return {feature: str(entry["name"]) for feature, entry in said["names"].items()}
