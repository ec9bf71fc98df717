"""The phantom: what a factor changes, where; that dials mean what they say; that bytes are reproducible."""

import contextlib
import json
import time

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from mechinterp.data.phantom import DETAILS, FACTORS, Phantom
from mechinterp.errors import DataError, MechInterpError, UsageError

FINDINGS = [name for name, factor in FACTORS.items() if factor.kind == "finding"]
LOCAL = [name for name, factor in FACTORS.items() if factor.scope == "local"]
GLOBAL = [name for name, factor in FACTORS.items() if factor.scope == "global"]


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return Phantom.sample(24, seed=3)


def with_and_without(phantom: Phantom, factor: str) -> tuple[Phantom, Phantom]:
    return phantom.do(**{factor: 0}), phantom.do(**{factor: 1})


def phi(phantom: Phantom, a: str, b: str) -> float:
    return float(np.corrcoef(phantom.factors[a], phantom.factors[b])[0, 1])


@pytest.mark.parametrize("factor", LOCAL)
def test_do_changes_a_local_factor_inside_its_mask_and_nothing_outside(phantom, factor):
    without, present = with_and_without(phantom, factor)
    mask = without.masks(factor) | present.masks(factor)
    change = np.abs(without.render().astype(int) - present.render().astype(int))
    near = np.stack([binary_dilation(m, np.ones((3, 3)), iterations=5) for m in mask])
    assert change[~near].max(initial=0) == 0, "a pixel away from the factor moved"
    assert mask.any(axis=(1, 2)).all(), "an image has no mask"
    assert mask.mean(axis=(1, 2)).max() < 0.5, "the mask is no place"
    seen = np.array([c[m].mean() for c, m in zip(change, mask, strict=True)])
    # a small effusion behind a huge heart in an overexposed image is faint, as in life; nearly all are plain
    assert (seen > 6).mean() > 0.9 and seen.min() > 2, (
        f"image {seen.argmin()} hardly shows it ({seen.min():.1f} levels)"
    )


@pytest.mark.parametrize("factor", [*FINDINGS, "drain", "pacemaker", "ecg_leads", "line", "portable"])
def test_masks_are_empty_exactly_where_the_factor_is_absent(phantom, factor):
    present = phantom.factors[factor].to_numpy() == 1
    assert (phantom.masks(factor).any(axis=(1, 2)) == present).all()


@pytest.mark.parametrize("factor", ["effusion", "pneumothorax", "consolidation", "nodule", "atelectasis"])
def test_a_finding_lies_on_the_side_that_its_truth_says(phantom, factor):
    right = phantom.do(**{factor: 1, f"{factor}_side": 0}).masks(factor).mean(axis=(0, 1))
    left = phantom.do(**{factor: 1, f"{factor}_side": 1}).masks(factor).mean(axis=(0, 1))
    half = phantom.size // 2
    assert right[:half].sum() > 0.97 * right.sum(), "the patient's right is on the left of the image"
    assert left[half:].sum() > 0.97 * left.sum()


@pytest.mark.parametrize("factor", ["effusion", "pneumothorax", "consolidation", "nodule"])
def test_a_larger_finding_has_a_larger_mask(phantom, factor):
    small = phantom.do(**{factor: 1, f"{factor}_size": 0}).masks(factor).sum(axis=(1, 2))
    large = phantom.do(**{factor: 1, f"{factor}_size": 1}).masks(factor).sum(axis=(1, 2))
    assert (large > small).all()


@pytest.mark.parametrize("factor", GLOBAL)
def test_a_global_factor_changes_every_image_and_its_mask_is_everything(phantom, factor):
    low, high = {"age": (25, 85), "exposure": (-0.5, 0.5)}.get(factor, (0, 1))
    change = phantom.do(**{factor: low}).render() != phantom.do(**{factor: high}).render()
    assert (change.mean(axis=(1, 2)) > 0.05).all()
    assert phantom.masks(factor).all()


def test_do_nothing_and_do_what_is_change_nothing(phantom):
    pixels = phantom.render()
    assert (phantom.do().render() == pixels).all()
    assert (phantom.do(**{name: phantom.factors[name].tolist() for name in FACTORS}).render() == pixels).all()
    assert phantom.do(portable=1).patients == phantom.patients


def test_do_holds_descendants(phantom):
    moved = phantom.do(hospital=1, sex=0, age=80)
    for name in ("view", "portable", "scanner", "breast", "cardiomegaly", *DETAILS):
        assert (moved.factors[name] == phantom.factors[name]).all(), name


def test_rows_render_alone_as_they_do_together(phantom):
    pixels = phantom.render()
    for rows in (slice(5, 18), [23, 2, 17], np.arange(24) % 5 == 1, 7):
        picked = phantom[rows]
        assert (picked.render() == np.atleast_3d(pixels[rows]).reshape(len(picked), 128, 128)).all()
        assert (picked.masks("effusion") == phantom.masks("effusion")[np.arange(24)[rows]]).all()
        assert picked.reports() == [phantom.reports()[i] for i in np.atleast_1d(np.arange(24)[rows])]


def test_one_seed_gives_the_same_bytes_and_another_seed_others():
    a, b, c = (Phantom.sample(n, seed=s).render() for n, s in ((12, 5), (20, 5), (12, 6)))
    assert (a == b[:12]).all(), "an image must not depend on how many are drawn"
    assert (a != c).any(axis=(1, 2)).all()


@pytest.mark.parametrize("size", [64, 256])
def test_other_sizes_show_the_same_chest(size):
    small, other = Phantom.sample(4, seed=1), Phantom.sample(4, seed=1, size=size)
    pixels = other.render()
    assert pixels.shape == (4, size, size)
    shrink = [
        p.astype(float).reshape(4, 32, s // 32, 32, s // 32).mean((2, 4))
        for p, s in ((small.render(), 128), (pixels, size))
    ]
    assert np.corrcoef(shrink[0].ravel(), shrink[1].ravel())[0, 1] > 0.95


@pytest.mark.parametrize(
    "dials",
    [
        {("portable", "consolidation"): 0.9},
        {("portable", "consolidation"): -0.5, ("portable", "edema"): 0.4},
        {("drain", "pneumothorax"): 0.8, ("sex", "effusion"): -0.6, ("age", "nodule"): 0.7},
        {("hospital", "cardiomegaly"): 0.5, ("scanner", "atelectasis"): 1.0, ("letter", "cardiomegaly"): 0.6},
    ],
)
def test_the_dial_is_the_phi_correlation(dials):
    n = 8000
    p = Phantom.sample(n, seed=9, associations=dials)
    p.factors["age"] = (p.factors["age"] >= 55).astype(int)
    for (shortcut, finding), rho in dials.items():
        assert abs(phi(p, shortcut, finding) - rho) < 0.05, (shortcut, finding, rho)
        assert abs(p.factors[shortcut].mean() - 0.5) < 0.03
        assert abs(p.factors[finding].mean() - 0.5) < 0.03


def test_without_a_dial_no_shortcut_is_associated_with_a_finding():
    p = Phantom.sample(8000, seed=10, associations={("portable", "consolidation"): 0.9})
    shortcuts = [n for n, f in FACTORS.items() if f.kind in ("device", "acquisition") and f.rate is not None]
    for shortcut in [*shortcuts, "sex"]:
        for finding in FINDINGS:
            if (shortcut, finding) != ("portable", "consolidation"):
                assert abs(phi(p, shortcut, finding)) < 0.06, (shortcut, finding)


def test_prevalences_patients_and_graph():
    p = Phantom.sample(8000, seed=11)
    for name, factor in FACTORS.items():
        if factor.rate is not None:
            assert abs(p.factors[name].mean() - factor.rate) < 0.03, name
    counts = p.factors["patient"].value_counts()
    assert counts.max() == 3 and 1.3 < counts.mean() < 1.5
    for name, factor in FACTORS.items():
        if factor.per == "patient":
            assert (p.factors.groupby("patient")[name].nunique() == 1).all(), name
    assert phi(p, "hospital", "scanner") > 0.4 and phi(p, "age", "cardiomegaly") > 0.2
    assert (p.factors["breast"][p.factors["sex"] == 1] == 0).all()


@pytest.mark.parametrize(
    "dials",
    [
        {("portable", "fracture"): 0.5},
        {("effusion", "edema"): 0.5},
        {("noise", "edema"): 0.5},
        {("portable", "edema"): 1.5},
        {("portable", "edema"): float("nan")},
        {("portable", "edema"): 0.7, ("portable", "nodule"): 0.7},
    ],
)
def test_a_dial_that_cannot_be_met_is_refused(dials):
    with pytest.raises(UsageError, match="associations"):
        Phantom.sample(10, associations=dials)


@pytest.mark.parametrize(
    "values",
    [
        {"tail": 1},
        {"portable": 2},
        {"view": "lateral"},
        {"edema": [1, 0]},
        {"age": "x"},
        {"exposure": 7.0},
        {"effusion": 0.5},
        {"noise": float("nan")},
    ],
)
def test_do_refuses_what_means_nothing(phantom, values):
    with pytest.raises(UsageError):
        phantom.do(**values)


def test_write_and_load_give_the_same_bytes_and_do_still_works(tmp_path, phantom):
    from PIL import Image

    some = phantom[4:14]
    folder = some.write(tmp_path / "p")
    back = Phantom.load(folder)
    assert (back.render() == some.render()).all() and back.patients == some.patients
    assert (back.do(portable=1, view="AP").render() == some.do(portable=1, view="AP").render()).all()
    with Image.open(folder / back.images[3]) as image:
        assert (np.asarray(image) == some.render()[3]).all()
    masks = some.masks("effusion")
    for name, mask in zip(back.images, masks, strict=True):
        path = folder / "masks" / "effusion" / name.removeprefix("images/")
        assert path.exists() == mask.any()
        if mask.any():
            with Image.open(path) as image:
                assert (np.asarray(image).astype(bool) == mask).all()


def test_written_folder_opens_as_a_data_folder(tmp_path, phantom):
    from mechinterp.data import open_data

    folder = phantom.write(tmp_path / "p", masks=True)
    data = open_data(folder)
    assert len(data) == len(phantom) and list(data.patients) == phantom.patients
    assert sorted(data.targets) == sorted(FINDINGS)
    for name in FINDINGS:
        assert (data.labels(name) == phantom.factors[name].to_numpy()).all()
    assert (np.round(data.pixels(range(3)) * 255) == phantom.render()[:3]).all()
    names = {attribute.name: attribute.kind for attribute in data.attributes}
    assert names["portable"] == "acquisition" and names["drain"] == "acquisition" and names["effusion"] == "finding"
    row = int(np.flatnonzero(phantom.factors["drain"])[0])
    mask = data.mask("drain", row)
    assert mask is not None and (mask == phantom.masks("drain")[row]).all()


def test_a_damaged_truth_gives_our_errors_only(tmp_path, phantom):
    folder = phantom[:4].write(tmp_path / "p", masks=False)
    path = folder / "truth.json"
    whole = path.read_bytes()
    truth = json.loads(whole)
    for name in truth:
        if name in ("generator", "graph"):
            continue
        for bad in (None, -1, "x", [], {}, [[1]], 1e300):
            path.write_text(json.dumps(truth | {name: bad}))
            if (name == "seed" and bad in (-1, 1e300)) or (name == "associations" and bad in ([], {})):
                continue
            with pytest.raises(MechInterpError):
                Phantom.load(folder)
    truth["factors"]["effusion"][0] = 3
    path.write_text(json.dumps(truth))
    with pytest.raises(DataError, match="truth"):
        Phantom.load(folder)
    rng = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(whole)
        broken[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(bytes(broken))
        with contextlib.suppress(MechInterpError):
            Phantom.load(folder).factors.sum(numeric_only=True)


def test_it_renders_fast_enough():
    p = Phantom.sample(48, seed=5)
    p[:2].render()
    best = np.inf
    for _ in range(6):
        start = time.process_time()
        p.render()
        best = min(best, time.process_time() - start)
    # the aim is 200 a second on a core of its own; a busy machine, type checks and xdist take their share
    assert len(p) / best > 80
