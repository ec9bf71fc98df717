"""Offline, one thread a worker, a cache folder of its own."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
from hypothesis import settings

# a property is not timed: where other work shares the machine, 200 ms a case would fail at random
settings.register_profile("house", deadline=None)
settings.load_profile("house")

NIH = Path(__file__).resolve().parents[2] / "shared" / "data" / "nih-cxr"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Tests neither read nor fill the user's cache."""
    before = os.environ.get("MECHINTERP_CACHE")
    os.environ["MECHINTERP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["MECHINTERP_CACHE"]
    else:
        os.environ["MECHINTERP_CACHE"] = before


@pytest.fixture(scope="session")
def nih_folder() -> Path:
    """The real NIH subset; tests that need it skip where it is absent."""
    if not (NIH / "metadata.csv").exists():
        pytest.skip("the NIH ChestX-ray14 subset is not beside this checkout")
    return NIH
