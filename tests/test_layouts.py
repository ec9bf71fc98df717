"""Other people's dictionaries: what their library computes from their files, ours computes from the imported folder.

The reference of each layout is its library's published formula, written out below on the raw state dict.
"""

import io
import json
import pickle
import shutil
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import saes.layouts.pickled as pickled
from mechinterp.errors import MechInterpError, StorageError, UsageError
from mechinterp.storage import read_json, verify_folder, write_manifest
from saes import load_sae
from saes.layouts import convert, export_dictionary_learning, import_dictionary
from saes.layouts.dictionary_learning import read_dictionary_learning
from saes.layouts.lens import read_lens

SITE, D, M, K = "vision.blocks.2.hook_resid_post", 6, 20, 3
X = torch.randn(64, D, generator=torch.Generator().manual_seed(1)) * 2

pytestmark = pytest.mark.xdist_group("saes")  # one worker imports sae_lens


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * len(shape) + sum(shape))) * scale


def unit(W_dec):
    return W_dec / W_dec.norm(dim=-1, keepdim=True)


@pytest.fixture
def here(monkeypatch):
    """Conversion in this process, for tests of what is computed: a process each would cost two seconds each."""

    def convert_here(path, converted):
        said = io.StringIO()
        with redirect_stdout(said):
            status = convert.main([str(path), str(converted)])
        if status:
            found = json.loads(said.getvalue())
            raise StorageError(found["what"], where=str(path), hint=found["hint"])

    monkeypatch.setattr(pickled, "_convert_apart", convert_here)


# dictionary_learning: state dicts by class, and its forward passes


def linear(b_dec="b_dec", bias="encoder.bias", dec_norm=1.0, k=None, threshold=None):
    state = {"encoder.weight": draw(M, D), "decoder.weight": (unit(draw(M, D, seed=1)) * dec_norm).T.contiguous()}
    state |= {b_dec: draw(D)} | ({} if bias is None else {bias: draw(M, scale=0.3)})
    state |= {} if k is None else {"k": torch.tensor(k, dtype=torch.int)}
    return state | ({} if threshold is None else {"threshold": torch.tensor(threshold)})


def direct(**more):
    return {"W_enc": draw(D, M), "W_dec": unit(draw(M, D, seed=1)), "b_enc": draw(M), "b_dec": draw(D), **more}


def autoencoder(s, x):
    f, norm = torch.relu((x - s["bias"]) @ s["encoder.weight"].T + s["encoder.bias"]), s["decoder.weight"].norm(dim=0)
    return f * norm, f @ s["decoder.weight"].T + s["bias"]  # what their loader makes of it: unit decoder columns


def autoencoder_new(s, x):
    f = torch.relu(x @ s["encoder.weight"].T + s["encoder.bias"])
    return f, f @ s["decoder.weight"].T + s["decoder.bias"]


def gated(s, x):
    u = (x - s["decoder_bias"]) @ s["encoder.weight"].T
    f = (u + s["gate_bias"] > 0) * torch.relu(s["r_mag"].exp() * u + s["mag_bias"])
    return f, f @ s["decoder.weight"].T + s["decoder_bias"]


def jumprelu(s, x):
    pre = x @ s["W_enc"] + s["b_enc"]
    f = torch.relu(pre * (pre > s["threshold"]))
    return f, f @ s["W_dec"] + s["b_dec"]


def topk(s, x):
    f = torch.relu((x - s["b_dec"]) @ s["encoder.weight"].T + s["encoder.bias"])
    kept = f >= f.sort(dim=-1, descending=True).values[:, int(s["k"]) - 1, None]
    return f * kept, (f * kept) @ s["decoder.weight"].T + s["b_dec"]


def batchtopk(s, x):
    f = torch.relu((x - s["b_dec"]) @ s["encoder.weight"].T + s["encoder.bias"])
    f = f * (f > s["threshold"])
    return f, f @ s["decoder.weight"].T + s["b_dec"]


def matryoshka(s, x):
    f = torch.relu((x - s["b_dec"]) @ s["W_enc"] + s["b_enc"])
    f = f * (f > s["threshold"])
    return f, f @ s["W_dec"] + s["b_dec"]


GATES = {"r_mag": draw(M, scale=0.2), "gate_bias": draw(M, seed=2), "mag_bias": draw(M, seed=3)}
GROUPS = {"k": torch.tensor(K), "threshold": torch.tensor(1.5), "group_sizes": torch.tensor([5, 5, 10])}
TWICE = torch.rand(M, 1, generator=torch.Generator().manual_seed(2)) + 0.5
THEIRS = {  # name: (class, state dict, forward pass)
    "standard": ("AutoEncoder", linear("bias"), autoencoder),
    "april": ("AutoEncoder", linear("bias", dec_norm=TWICE), autoencoder),
    "new": ("AutoEncoderNew", linear("decoder.bias", dec_norm=TWICE), autoencoder_new),
    "gated": ("GatedAutoEncoder", linear("decoder_bias", bias=None) | GATES, gated),
    "jumprelu": ("JumpReluAutoEncoder", direct(threshold=draw(M).abs()), jumprelu),
    "topk": ("AutoEncoderTopK", linear(k=K, threshold=0.7), topk),
    "batchtopk": ("BatchTopKSAE", linear(k=K, threshold=1.2), batchtopk),
    "unmeasured": ("BatchTopKSAE", linear(k=K, threshold=-1.0), batchtopk),
    "matryoshka": ("MatryoshkaBatchTopKSAE", direct(**GROUPS), matryoshka),
}


def write_theirs(folder, kind, pickle=True, **trainer):
    name, state, forward = THEIRS[kind]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, **trainer}, "buffer": {}}))
    if pickle:
        torch.save(state, folder / "ae.pt")
    else:
        save_file(state, folder / "ae.safetensors")
    return state, forward


def close(found, expected, rtol=1e-6):
    """Equal to a millionth of the largest value: single precision has no more."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * max(1.0, expected.abs().max().item()))


def same(placed, expected, rtol=1e-6):
    codes, reconstruction = expected
    ours = placed.dictionary
    close(ours.encode(X), codes, rtol)
    close(ours.decode(ours.encode(X)), reconstruction, rtol)
    assert 0 < (codes > 0).float().mean() < 0.9  # a test of zeros would test nothing


@pytest.mark.parametrize("kind", THEIRS)
def test_dictionary_learning_computes_the_same(kind, tmp_path, here):
    state, forward = write_theirs(tmp_path / "in", kind)
    placed = import_dictionary(tmp_path / "in", SITE, tmp_path / "out", tokens="patch")
    same(placed, forward(state, X))
    info = placed.dictionary.info
    assert str(placed.reads) == str(placed.writes) == SITE == info["site"] and info["tokens"] == "patch"
    assert info["imported"]["class"] == THEIRS[kind][0] and set(info["imported"]["files"]) == {"ae.pt", "config.json"}
    assert bool(info["imported"]["notes"]) == (kind == "unmeasured")
    assert verify_folder(tmp_path / "out") == []


@pytest.mark.parametrize("kind", sorted(set(THEIRS) - {"topk", "batchtopk", "unmeasured"}))
def test_the_class_shows_in_the_tensors_where_config_is_missing(kind, tmp_path, here):
    write_theirs(tmp_path / "in", kind)
    (tmp_path / "in" / "config.json").unlink()
    found, files = read_dictionary_learning(tmp_path / "in" / "ae.pt")
    assert found.about["class"] == THEIRS[kind][0] and [path.name for path in files] == ["ae.pt"]


def test_topk_and_batchtopk_cannot_be_told_apart_without_config(tmp_path, here):
    write_theirs(tmp_path / "in", "topk")
    (tmp_path / "in" / "config.json").unlink()
    with pytest.raises(StorageError, match=r"cannot be told.*config\.json"):
        import_dictionary(tmp_path / "in", SITE, tmp_path / "out")


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "topk", "batchtopk", "unmeasured", "matryoshka"])
def test_backup_of_an_unfinished_run_with_normalised_activations(kind, tmp_path, here):
    """Its weights are for x / factor: f(x) = factor * f_normalised(x / factor), which `scale_biases` makes of them."""
    state, forward = write_theirs(tmp_path / "in", kind)
    backup = {"step": 7, "ae": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "norm_factor": 2.5}
    torch.save({**backup, "config": {"device": torch.device("cpu"), "lr": 1e-3}}, tmp_path / "in" / "ae.pt")
    placed = import_dictionary(tmp_path / "in", SITE, tmp_path / "out")
    codes, reconstruction = forward(state, X / 2.5)
    same(placed, (2.5 * codes, 2.5 * reconstruction))
    assert placed.dictionary.info["imported"]["norm_factor"] == 2.5


def test_checkpoint_in_the_folder_below_its_config(tmp_path, here):
    state, forward = write_theirs(tmp_path / "in", "topk", k=K)
    (tmp_path / "in" / "checkpoints").mkdir()
    (tmp_path / "in" / "ae.pt").rename(tmp_path / "in" / "checkpoints" / "ae_500.pt")
    same(import_dictionary(tmp_path / "in/checkpoints/ae_500.pt", SITE, tmp_path / "out"), forward(state, X))


@pytest.mark.parametrize("kind", sorted(set(THEIRS) - {"unmeasured"}))
def test_export_and_back(kind, tmp_path, here):
    state, forward = write_theirs(tmp_path / "in", kind)
    first = import_dictionary(tmp_path / "in", SITE, tmp_path / "mid")
    name = export_dictionary_learning(tmp_path / "mid", tmp_path / "exported")
    assert name == THEIRS[kind][0]
    exported = load_file(tmp_path / "exported" / "ae.safetensors")
    assert set(exported) == set(state)
    if kind != "april":  # there the norms are folded
        for tensor in set(state) - ({"threshold"} if kind == "topk" else set()):
            close(exported[tensor].double(), state[tensor].double())
    codes, reconstruction = forward(exported, X)
    close(first.dictionary.encode(X), codes)
    close(first.dictionary(X), reconstruction)
    again = import_dictionary(tmp_path / "exported", SITE, tmp_path / "back")
    close(again.dictionary.encode(X), first.dictionary.encode(X))


@pytest.mark.parametrize(
    ("kind", "name"), [("standard", "AutoEncoderNew"), ("topk", "AutoEncoderTopK"), ("jumprelu", "JumpReluAutoEncoder")]
)
def test_export_where_the_class_treats_b_dec_otherwise(kind, name, tmp_path):
    cfg, weights = lens(kind, apply_b_dec_to_input=kind == "jumprelu")
    save_lens(tmp_path / "in", cfg, weights)
    first = import_dictionary(tmp_path / "in", SITE, tmp_path / "mid")
    assert export_dictionary_learning(tmp_path / "mid", tmp_path / "exported") == name
    forward = {"standard": autoencoder_new, "topk": topk, "jumprelu": jumprelu}[kind]
    codes, _ = forward(load_file(tmp_path / "exported" / "ae.safetensors"), X)
    close(first.dictionary.encode(X), codes)
    with pytest.raises(StorageError, match="not an empty folder"):
        export_dictionary_learning(tmp_path / "mid", tmp_path / "exported")


# sae-lens


def lens(kind, **more):
    weights = {"W_enc": draw(D, M), "W_dec": draw(M, D, seed=1), "b_dec": draw(D), "b_enc": draw(M, scale=0.3)}
    match kind:
        case "jumprelu":
            weights["threshold"] = draw(M).abs()
        case "gated":
            del weights["b_enc"]
            weights |= {"b_gate": draw(M, seed=2), "b_mag": draw(M, seed=3), "r_mag": draw(M, scale=0.2)}
        case "batchtopk" | "matryoshka_batchtopk":
            weights["topk_threshold"] = torch.tensor(0.9, dtype=torch.double)
    cfg = {"architecture": kind, "d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu"}
    cfg |= {"k": K} if "topk" in kind else {}
    cfg |= {"matryoshka_widths": [5, M]} if kind.startswith("matryoshka") else {}
    return cfg | {"metadata": {"sae_lens_version": "6.54.12"}} | more, weights


def save_lens(folder, cfg, weights):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


LENS = [
    ("standard", {}),
    ("topk", {}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("topk", {"apply_b_dec_to_input": False}),
    ("jumprelu", {}),
    ("jumprelu", {"apply_b_dec_to_input": False, "normalize_activations": "expected_average_only_in"}),
    ("gated", {}),
]


@pytest.mark.parametrize(("kind", "more"), LENS, ids=str)
def test_sae_lens_reads_theirs_and_ours_alike(kind, more, tmp_path):
    """sae-lens itself is the reference: on its folder, and on what the import wrote."""
    from sae_lens import SAE

    save_lens(tmp_path / "in", *lens(kind, **more))
    theirs = SAE.load_from_disk(tmp_path / "in")
    placed = import_dictionary(tmp_path / "in", SITE, tmp_path / "out")
    expected = theirs.encode(X).detach(), theirs(X).detach()
    same(placed, expected)
    again = SAE.load_from_disk(tmp_path / "out")
    close(again.encode(X), expected[0])
    close(again(X), expected[1])
    assert again.cfg.metadata.hook_name == SITE


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka_batchtopk"])
def test_checkpoints_of_the_sae_lens_trainer(kind, tmp_path):
    """One threshold for all latents, on activations in units of the decoder norm, and a factor not yet folded in."""
    cfg, w = lens(kind, rescale_acts_by_decoder_norm=True)
    save_lens(tmp_path / "in", cfg, w)
    (tmp_path / "in" / "activation_scaler.json").write_text('{"scaling_factor": 0.4, "has_whitening": false}')
    placed = import_dictionary(tmp_path / "in", SITE, tmp_path / "out")
    norm = w["W_dec"].norm(dim=-1)
    f = torch.relu(((0.4 * X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norm)
    f = f * (f > 0.9)
    same(placed, (f / 0.4, ((f / norm) @ w["W_dec"] + w["b_dec"]) / 0.4))  # in units of the rows as they are
    if kind.startswith("matryoshka"):
        assert placed.dictionary.info["imported"]["group_sizes"] == [5, M - 5]
        assert export_dictionary_learning(tmp_path / "out", tmp_path / "exported") == "MatryoshkaBatchTopKSAE"


def test_sae_lens_before_version_6(tmp_path):
    cfg, weights = lens("topk")
    old = {"d_in": D, "d_sae": M, "dtype": "float32", "hook_point": "blocks.1.hook_resid_pre"}
    old |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": False}
    new, _ = read_lens(save_lens(tmp_path / "new", cfg, weights))
    found, _ = read_lens(save_lens(tmp_path / "old", old, weights))
    assert (found.architecture, found.k, found.centred) == (new.architecture, new.k, new.centred) == ("topk", K, True)
    log = {**lens("jumprelu")[1], "log_threshold": draw(M)}
    del log["threshold"]
    jump, _ = read_lens(save_lens(tmp_path / "log", lens("jumprelu")[0], log))
    torch.testing.assert_close(jump.vectors["threshold"], draw(M).exp().double())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"normalize_activations": "layer_norm"}, "layer_norm"),
        ({"normalize_activations": "constant_norm_rescale"}, "constant_norm_rescale"),
        ({"reshape_activations": "hook_z"}, "hook_z"),
        ({"architecture": "temporal"}, "temporal"),
        ({"activation_fn": "tanh-relu"}, "tanh-relu"),
        ({"d_sae": 21}, "W_enc"),
        ({"d_sae": "many"}, "damaged"),
        ({"d_in": None}, "damaged"),
    ],
)
def test_sae_lens_that_is_not_read_says_which_field(more, words, tmp_path):
    save_lens(tmp_path / "in", *lens("standard", **more))
    with pytest.raises(StorageError, match=words):
        import_dictionary(tmp_path / "in", SITE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# saev


def saev_forward(w, x, centred, activation, k=K):
    h = (x - w["b_dec"] if centred else x) @ w["W_enc"] + w["b_enc"]
    match activation:
        case "Relu":
            f = torch.relu(h)
        case "TopK":  # no relu: saev keeps what is among the k largest, whatever its sign
            f = h * (h >= h.sort(dim=-1, descending=True).values[:, k - 1, None])
        case "BatchTopK":
            f = torch.where(h > w["activation.threshold"], h, 0.0)
    return f, f @ w["W_dec"] + w["b_dec"]


def write_saev(path, header, w):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as opened:
        opened.write(json.dumps(header).encode() + b"\n")
        torch.save(w, opened)


def schema(number, activation, **params):
    return {"schema": number, "cfg": {"d_model": D, "d_sae": M, "activation": {"cls": activation, "params": params}}}


SAEV = [
    ({"d_vit": D, "exp_factor": 3, "sparsity_coeff": 4e-4}, "Relu", True),
    ({"schema": 1, "cls": "TopK", "cfg": {"d_vit": D, "top_k": K}, "commit": "a", "lib": "0"}, "TopK", True),
    (schema(1, "Relu") | {"cls": "SparseAutoencoderConfig"}, "Relu", False),
    (schema(3, "BatchTopK", top_k=K), "TopK", False),  # before it had a threshold: k of each row
    (schema(5, "TopK", top_k=K, key="top-k", aux={"cls": "AuxK", "params": {}}), "TopK", False),
    (schema(5, "BatchTopK", top_k=K), "BatchTopK", False),
]


@pytest.mark.parametrize(("header", "activation", "centred"), SAEV, ids=str)
def test_saev_computes_the_same(header, activation, centred, tmp_path, here):
    w = direct() | {"b_enc": draw(M, scale=0.3)}
    w |= {"activation.threshold": torch.tensor(1.1)} if activation == "BatchTopK" else {}
    write_saev(tmp_path / "run" / "checkpoint" / "sae.pt", header, w)
    placed = import_dictionary(tmp_path / "run", SITE, tmp_path / "out")
    expected = saev_forward(w, X, centred, activation)
    assert (expected[0] >= 0).all()
    same(placed, expected)
    notes = " ".join(placed.dictionary.info["imported"]["notes"])
    assert ("does not subtract b_dec" in notes) == centred and ("negative values" in notes) == (activation == "TopK")


def test_saev_negative_values_among_the_largest_become_zero(tmp_path, here):
    """The one stated departure: where fewer than k latents are positive."""
    w = direct() | {"b_enc": draw(M, scale=0.3) - 4}
    write_saev(tmp_path / "sae.pt", schema(5, "TopK", top_k=K), w)
    ours = import_dictionary(tmp_path / "sae.pt", SITE, tmp_path / "out").dictionary
    theirs, _ = saev_forward(w, X, False, "TopK")
    assert (theirs < 0).any()
    close(ours.encode(X), theirs.relu())


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", ["Relu", "gated"])
def test_rows_normalised_before_the_dictionary(kind, centred, tmp_path, here):
    mean, scale = draw(D, seed=9), 1.7
    if kind == "Relu":
        w = direct() | {"b_enc": draw(M, scale=0.3)}
        write_saev(tmp_path / "in" / "sae.pt", SAEV[0][0] if centred else schema(5, "Relu"), w)
        codes, reconstruction = saev_forward(w, (X - mean) / scale, centred, "Relu")
    else:
        cfg, w = lens("gated", apply_b_dec_to_input=centred)
        save_lens(tmp_path / "in", cfg, w)
        u = ((X - mean) / scale - (w["b_dec"] if centred else 0)) @ w["W_enc"]
        codes = (u + w["b_gate"] > 0) * torch.relu(u * w["r_mag"].exp() + w["b_mag"])
        reconstruction = codes @ w["W_dec"] + w["b_dec"]
    placed = import_dictionary(tmp_path / "in", SITE, tmp_path / "out", mean=mean, scale=scale)
    same(placed, (codes, reconstruction * scale + mean))
    np.testing.assert_allclose(placed.dictionary.info["imported"]["mean"], mean.numpy())


# what must be refused


class Malicious:
    """A pickle that makes a file when it is opened the careless way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return shutil.copyfile, (__file__, str(self.path))


@pytest.mark.parametrize("how", ["raw", "archive", "inside", "saev"])
def test_a_malicious_pickle_is_refused(how, tmp_path, here):
    evil, made = Malicious(tmp_path / "made"), tmp_path / "made"
    path = tmp_path / "ae.pt"
    match how:
        case "raw":
            path.write_bytes(pickle.dumps(evil, protocol=2))
        case "archive":
            torch.save(evil, path)
        case "inside":
            torch.save({**THEIRS["standard"][1], "extra": evil}, path)
        case "saev":
            write_saev(path, schema(5, "Relu"), {**direct(), "extra": evil})
    with pytest.raises(StorageError, match=r"wants to run shutil\.copyfile") as refused:
        import_dictionary(path, SITE, tmp_path / "out")
    assert "weights_only" not in str(refused.value)  # torch's own words tell how to open it all the same
    assert not made.exists() and not (tmp_path / "out").exists()
    with path.open("rb") as opened:
        if how == "saev":
            opened.readline()
        load = pickle.load if how == "raw" else lambda file: torch.load(io.BytesIO(file.read()), weights_only=False)
        load(opened)
    assert made.exists()  # opened carelessly, it does what it came for


def test_the_pickle_is_opened_in_a_process_of_its_own(tmp_path, monkeypatch):
    """Nothing is unpickled here; the other process refuses code even where the environment asks for it to be run."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    state, forward = write_theirs(tmp_path / "in", "topk")
    torch.save({**state, "extra": Malicious(tmp_path / "made")}, tmp_path / "evil.pt")

    def never(*args, **kwargs):
        raise AssertionError("unpickled in this process")

    monkeypatch.setattr(torch, "load", never)
    with pytest.raises(StorageError, match=r"evil\.pt.*wants to run shutil\.copyfile"):
        import_dictionary(tmp_path / "evil.pt", SITE, tmp_path / "evil")
    assert not (tmp_path / "made").exists()
    same(import_dictionary(tmp_path / "in", SITE, tmp_path / "out"), forward(state, X))


def test_a_converter_that_dies_is_our_error(tmp_path, monkeypatch):
    (tmp_path / "ae.pt").write_bytes(b"x")
    monkeypatch.setattr(pickled.sys, "executable", "/bin/false")
    with pytest.raises(StorageError, match="ended with status 1"):
        import_dictionary(tmp_path / "ae.pt", SITE, tmp_path / "out")


def bent(state, name, tensor):
    return {**state, name: tensor}


@pytest.mark.parametrize("kind", ["standard", "gated", "jumprelu", "topk", "matryoshka"])
def test_broken_dictionary_learning_gives_only_our_errors(kind, tmp_path, here):
    state, _ = write_theirs(tmp_path / "in", kind)
    path = tmp_path / "in" / "ae.pt"
    matters = set(state) - ({"threshold"} if kind == "topk" else set())
    for name in matters:
        without = {other: tensor for other, tensor in state.items() if other != name}
        wrong_shape = bent(state, name, torch.ones(3, 2, 1))
        infinite = bent(state, name, torch.full(state[name].shape, float("nan")))
        for broken in (without, wrong_shape, infinite):
            if broken is without and name == "k":
                continue  # config.json may say it
            torch.save(broken, path)
            with pytest.raises(MechInterpError):
                import_dictionary(tmp_path / "in", SITE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["sae_lens", "dictionary_learning", "saev", "exported"])
def test_flipped_and_missing_bytes_give_only_our_errors(layout, tmp_path, here):
    """A flip inside the numbers of a file without checksums cannot be seen; every other must be ours or be harmless."""
    folder = tmp_path / "in"
    match layout:
        case "sae_lens":
            save_lens(folder, *lens("jumprelu"))
        case "dictionary_learning" | "exported":
            write_theirs(folder, "matryoshka", pickle=layout == "dictionary_learning")
        case "saev":
            write_saev(folder / "sae.pt", schema(5, "BatchTopK", top_k=K), direct())
    rng, refused = np.random.default_rng(0), 0
    files = list(folder.iterdir())
    for trial in range(24):
        path = files[trial % len(files)]
        whole = path.read_bytes()
        near = len(whole) if trial % 3 else min(len(whole), 200)  # headers are where it matters
        at = int(rng.integers(near))
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged) if trial % 4 else whole[:at])
        out = tmp_path / f"out{trial}"
        try:
            import_dictionary(folder, SITE, out).dictionary.encode(X)
        except MechInterpError:
            refused += 1
            assert not (out / "manifest.json").exists()
        path.write_bytes(whole)
    assert refused >= 6


def test_a_tensor_that_claims_more_than_its_file_is_refused(tmp_path):
    huge = torch.zeros(1).expand(2**20, 2**12)
    torch.save({**THEIRS["topk"][1], "huge": huge}, tmp_path / "ae.pt")
    with pytest.raises(StorageError, match="claims"):
        convert.convert(tmp_path / "ae.pt", tmp_path / "x.safetensors")
    torch.save([1, 2], tmp_path / "ae.pt")
    with pytest.raises(StorageError, match="list"):
        convert.convert(tmp_path / "ae.pt", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_shared_storage_is_kept_apart(tmp_path):
    """Older saev files tie W_enc to the transpose of W_dec in one storage."""
    W_dec = unit(draw(M, D))
    torch.save({"W_dec": W_dec, "W_enc": W_dec.T}, tmp_path / "ae.pt")
    convert.convert(tmp_path / "ae.pt", tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    torch.testing.assert_close(found["W_enc"], W_dec.T)


# recognising, folders, command line


def test_folders_that_are_none_or_several(tmp_path, here):
    with pytest.raises(StorageError, match="no such"):
        import_dictionary(tmp_path / "nowhere", SITE, tmp_path / "out")
    (tmp_path / "in").mkdir()
    with pytest.raises(StorageError, match="holds no dictionary"):
        import_dictionary(tmp_path / "in", SITE, tmp_path / "out")
    save_lens(tmp_path / "in", *lens("standard"))
    write_saev(tmp_path / "in" / "sae.pt", schema(5, "Relu"), direct())
    with pytest.raises(StorageError, match="sae_lens or saev"):
        import_dictionary(tmp_path / "in", SITE, tmp_path / "out")
    with pytest.raises(UsageError, match="no layout"):
        import_dictionary(tmp_path / "in", SITE, tmp_path / "out", "eleuther")
    with pytest.raises(UsageError, match="hook name"):
        import_dictionary(tmp_path / "in", "layer 3", tmp_path / "out", "sae_lens")
    with pytest.raises(UsageError, match="scale"):
        import_dictionary(tmp_path / "in", SITE, tmp_path / "out", "sae_lens", scale=0.0)
    with pytest.raises(UsageError, match="mean"):
        import_dictionary(tmp_path / "in", SITE, tmp_path / "out", "sae_lens", mean=torch.ones(D + 1))
    first = import_dictionary(tmp_path / "in", SITE, tmp_path / "out", "sae_lens")
    assert first.dictionary.info["imported"]["layout"] == "sae_lens"


def test_the_same_import_again_is_loaded_and_another_is_refused(tmp_path):
    save_lens(tmp_path / "in", *lens("standard"))
    import_dictionary(tmp_path / "in", SITE, tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    again = import_dictionary(tmp_path / "in", SITE, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before
    assert torch.equal(again.dictionary.W_enc, load_sae(tmp_path / "out").dictionary.W_enc)
    with pytest.raises(StorageError, match="another dictionary"):
        import_dictionary(tmp_path / "in", "vision.blocks.3.hook_resid_post", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="not empty"):
        import_dictionary(tmp_path / "in", SITE, tmp_path / "full")


def test_disagreement_between_config_and_weights(tmp_path, here):
    write_theirs(tmp_path / "a", "topk", k=K + 1)
    with pytest.raises(StorageError, match=r"k is 4 in config\.json and 3 in the weights"):
        import_dictionary(tmp_path / "a", SITE, tmp_path / "out")
    write_theirs(tmp_path / "b", "standard", dict_class="GatedAutoEncoder")
    with pytest.raises(StorageError, match="says GatedAutoEncoder, its tensors say AutoEncoder"):
        import_dictionary(tmp_path / "b", SITE, tmp_path / "out")
    write_theirs(tmp_path / "c", "topk", dict_class="CrossCoder")
    with pytest.raises(StorageError, match="CrossCoder"):
        import_dictionary(tmp_path / "c", SITE, tmp_path / "out")


def test_a_transcoder_is_not_exported(tmp_path):
    save_lens(tmp_path / "in", *lens("standard"))
    import_dictionary(tmp_path / "in", SITE, tmp_path / "out")
    info = read_json(tmp_path / "out" / "mechinterp.json")
    (tmp_path / "out" / "mechinterp.json").write_text(json.dumps({**info, "writes": "vision.blocks.2.hook_mlp_out"}))
    write_manifest(tmp_path / "out", {"kind": "dictionary"})
    with pytest.raises(StorageError, match="transcoder"):
        export_dictionary_learning(tmp_path / "out", tmp_path / "exported")


def test_command_line(tmp_path, capsys):
    from mechinterp.cli import main

    save_lens(tmp_path / "in", *lens("topk"))
    assert main(["import", str(tmp_path / "in"), "--site", SITE, "--out", str(tmp_path / "out")]) == 0
    assert "20 latents, topk of sae_lens" in capsys.readouterr().out
    assert main(["import", str(tmp_path), "--site", SITE, "--out", str(tmp_path / "o")]) == 2
    assert "holds no dictionary" in capsys.readouterr().err
