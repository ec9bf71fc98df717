"""The truth that dictionaries of words are judged by: what is said at a token, and up to it, and no further."""

import numpy as np
import pytest

from benchmarks.words import CONCEPTS, facts

TEXT = "there is a small left pneumothorax . no pleural effusion . a chest tube is seen".split()
KNOWN = {  # concept: at which words
    "named pneumothorax": [5],
    "affirmed pneumothorax": range(5, 16),  # once said it stays said
    "named effusion": [9],
    "affirmed effusion": [],  # it is denied
    "named drain": [12, 13],  # both words of the device's name
    "affirmed drain": range(13, 16),  # at "chest" nobody can know yet
    "in a denial": [7, 8, 9],
}


@pytest.mark.parametrize("concept", list(KNOWN))
def test_what_is_known_at_each_word(concept):
    found = facts(["", *TEXT])
    assert found.shape == (1 + len(TEXT), len(CONCEPTS)) and not found[0].any()  # a special token says nothing
    assert found[1:, CONCEPTS.index(concept)].nonzero()[0].tolist() == list(KNOWN[concept])


def test_the_end_of_a_text_knows_all_of_it_and_what_is_affirmed_never_reads_on():
    whole = facts(["", *TEXT, ""])
    half = len(CONCEPTS) // 2
    np.testing.assert_array_equal(whole[-1, half:-1], whole[-2, half:-1])
    assert not whole[-1, :half].any()
    for cut in range(2, len(TEXT)):
        np.testing.assert_array_equal(facts(["", *TEXT[:cut]])[:, half:], whole[: 1 + cut, half:])
