"""Numbers about dictionaries: fidelity, sparsity, meaning, recovery. Each formula stands in its docstring.

    from saes.metrics import r2, monosemanticity, match_score

fidelity        R2, L0, dead, loss recovered, frequency histogram, shrinkage, c_dec
images          what a latent does on an image: the maximum over its tokens
alignment       AUROC, average precision, F1 at a held-out threshold, tests of all latents under FDR control
matching        MATCHScore (FBMP), TAPAScore            pairs: renderings that differ in one factor
selectivity     monosemanticity (two readings, chance-corrected), label entropy
probing         linear and k-sparse probes
absorption      absorption (SAEBench's, and exact), splitting, merging
disentanglement DCI, MIG, RAVEL's cause and isolation
recovery        MCC with its floor, stability over seeds, reappearance
spatial         IoU, pointing, precision for masks, Moran's I

Names are imported when first used, as some need more than torch. `absorption` and `recovery` are modules: the functions
of those names are `absorption.absorption` and `recovery.recovery`.
"""

from __future__ import annotations

from mechinterp.lazy import lazily
from saes.metrics.fidelity import Evaluation, dead, evaluate, frequency, l0, r2
from saes.metrics.images import image_activations, image_table

_HOME = {
    "fidelity": (
        "FrequencyHistogram bias_share c_dec frequency_histogram kl_score loss_recovered relative_reconstruction_bias "
        "shrinkage"
    ),
    "images": "image_errors pooled_site",
    "alignment": (
        "Alignment FeatureTests align auroc_table average_precision average_precision_table best_thresholds f_beta "
        "f_score feature_tests sensitivity"
    ),
    "matching": "Match TapaScore fbmp match match_score tapa_score",
    "pairs": "RenderedPairs rendered_pairs",
    "selectivity": (
        "chance_corrected label_divergence label_entropy label_shares mean_cosine monosemanticity monosemanticity_pairs"
    ),
    "probing": "LinearProbe SparseProbe k_sparse_probe linear_probe rank_by_mean_difference",
    "absorption": "ExactAbsorption ProbeAbsorption exact_absorption merging_rate splitting_rate",
    "disentanglement": "Dci Ravel dci interchange mig mutual_information probe_importance ravel",
    "recovery": "Reappearance Recovery Stability mcc mcc_floor reappearance stability uniqueness",
    "spatial": "best_iou_threshold grid_weights iou mask_precision morans_i patch_masks pointing",
}
_MODULE = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = ["Evaluation", "dead", "evaluate", "frequency", "image_activations", "image_table", "l0", "r2"]
__all__ += sorted(_MODULE)  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__ = lazily(__name__, _MODULE)


def __dir__() -> list[str]:
    return sorted(__all__)
