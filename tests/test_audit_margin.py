"""Blurring the margin removes what stands there and nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechinterp.audit.margin import blur_margin, ring


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(0.2, 0.8, (3, 64, 64)).astype(np.float32)


def test_a_letter_in_the_margin_goes_and_the_middle_stays(images):
    smooth = np.full_like(images, 0.5)
    marked = smooth.copy()
    marked[:, 2:6, 2:5] = 1.0
    after = blur_margin(marked, ring(64))
    assert marked.max() - 0.5 == pytest.approx(0.5)
    assert after.max() - 0.5 < 0.15
    inside = slice(16, 48)
    assert np.abs(blur_margin(images, ring(64)) - images)[:, inside, inside].max() < 1e-6


@given(level=st.floats(0, 1), size=st.sampled_from([32, 64, 128]))
def test_a_flat_image_does_not_change(level, size):
    flat = np.full((1, size, size), level, dtype=np.float32)
    for where in (ring(size), ~ring(size)):
        assert np.abs(blur_margin(flat, where) - flat).max() < 1e-5


def test_the_ring_is_an_eighth_on_each_side():
    outer = ring(64)
    assert outer[:8].all() and outer[:, -8:].all() and not outer[8:-8, 8:-8].any()
