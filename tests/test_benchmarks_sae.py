"""The sae benchmark says whom it is without, and times what it says it times."""

import sys
import time

import pytest
import torch

from benchmarks import sae_speed
from benchmarks.sae_lens_peer import sae_lens_trainer
from benchmarks.sae_speed import PEER_PYTHON, Seconds, elsewhere, here, in_turns
from saes.config import TranscoderConfig
from saes.engine.trainer import Trainer


def test_a_peer_that_is_not_there_is_left_out_with_a_word(monkeypatch, capsys):
    batches = [torch.randn(4, 3)]
    monkeypatch.delenv(PEER_PYTHON, raising=False)
    assert elsewhere("topk", batches, 1, 4) == []
    assert f"without dictionary_learning, sparsify ({PEER_PYTHON} is not set" in capsys.readouterr().out
    monkeypatch.setenv(PEER_PYTHON, "there/is/no/python")
    assert elsewhere("batchtopk", batches, 1, 4) == []
    assert "without dictionary_learning ([Errno 2]" in capsys.readouterr().out


def test_an_interpreter_without_the_package_is_left_out(monkeypatch, capsys, tmp_path):
    script = tmp_path / "peer.py"
    script.write_text("import there_is_no_such_package")
    monkeypatch.setattr(sae_speed, "SCRIPT", script)
    monkeypatch.setenv(PEER_PYTHON, sys.executable)
    assert elsewhere("batchtopk", [torch.randn(4, 3)], 1, 4) == []
    assert "ModuleNotFoundError: No module named 'there_is_no_such_package'" in capsys.readouterr().out


def test_a_peer_elsewhere_steps_when_it_is_asked_to(monkeypatch, tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(
        "import json, sys\n"
        "print(json.dumps({'version': '7', 'loss': 1.0}), flush=True)\n"
        "for turn, _ in enumerate(sys.stdin, start=1):\n"
        "    print(json.dumps({'wall': 2.0 * turn, 'cpu': 1.0 * turn, 'loss': 0.5}), flush=True)\n"
    )
    monkeypatch.setattr(sae_speed, "SCRIPT", script)
    monkeypatch.setenv(PEER_PYTHON, sys.executable)
    (peer,) = elsewhere("batchtopk", [torch.randn(4, 3)], 1, 4)
    with peer:
        assert peer.name == "dictionary_learning 7"
        found = in_turns({"peer": peer}, 3)  # steps 2, 3 and 4, after one that does not count
    assert found == {"peer": Seconds(6.0, 3.0)}


class Sleeper:
    """A trainer that waits, which takes time and no CPU time, then works, which takes both."""

    def step(self, batch):
        time.sleep(0.05)
        start = time.process_time()
        while time.process_time() - start < 0.02:
            pass


def test_both_clocks():
    found = in_turns({"ours": here(Sleeper(), [torch.zeros(1)])}, 3)["ours"]
    assert found.wall > 0.069 and 0.019 < found.cpu < 0.05


def test_sae_lens_has_no_trainer_of_transcoders():
    ours = Trainer(TranscoderConfig(k=2, width=8), 3, torch.zeros(3), 10)
    with pytest.raises(TypeError, match="transcoder"):
        sae_lens_trainer(ours)
