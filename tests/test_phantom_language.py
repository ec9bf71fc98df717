"""Reports, captions and questions say what is true, in a closed language that the parser reads back."""

import numpy as np
import pytest

from mechinterp.data.phantom import FACTORS, MENTIONED, VOCABULARY, Phantom, mentions, prompts, question_answers
from mechinterp.data.phantom.language import named


@pytest.fixture(scope="module")
def crowd() -> Phantom:
    return Phantom.sample(300, seed=2)


def test_a_report_mentions_everything_present_and_denies_nothing_present(crowd):
    denied = 0
    for row, report in zip(crowd.factors.to_dict("records"), crowd.reports(), strict=True):
        said = mentions(report)
        for name in MENTIONED:
            assert (said[name] == 1) == (row[name] == 1), (name, report)
            denied += said[name] == 0
    assert denied > 2 * len(crowd), "absent findings are negated often"


def test_captions_are_short_and_true(crowd):
    captions = crowd.captions()
    for row, caption in zip(crowd.factors.to_dict("records"), captions, strict=True):
        assert len(caption.split()) <= 24
        said = mentions(caption)
        for name in MENTIONED:
            assert (said[name] == 1) == (row[name] == 1), (name, caption)
        healthy = not any(row[name] for name in MENTIONED if FACTORS[name].kind == "finding")
        assert ("no acute finding" in caption) == healthy
    assert len(set(captions)) > len(crowd) / 3


def test_sides_are_told(crowd):
    for row, report in zip(crowd.factors.to_dict("records"), crowd.reports(), strict=True):
        if row["nodule"] == 1:
            sentence = next(s for s in report.split(" . ") if "nodule" in s)
            assert ("right", "left")[row["nodule_side"]] in sentence.split()


def test_the_vocabulary_is_closed_and_small(crowd):
    texts = crowd.reports() + crowd.captions()
    texts += [text for name in MENTIONED for text in prompts(name)]
    texts += [text for asked in question_answers(crowd) for pair in asked for text in pair]
    words = {word for text in texts for word in text.split()}
    assert words <= set(VOCABULARY)
    assert len(VOCABULARY) < 400 and list(VOCABULARY) == sorted(VOCABULARY)
    assert all(word == word.lower() and word.isascii() for word in VOCABULARY)
    assert all("  " not in text and text == text.strip() for text in texts)


def test_acquisition_is_never_mentioned(crowd):
    never = {"portable", "ap", "pa", "scanner", "hospital", "marker", "letter", "exposure", "male", "female"}
    assert not never & set(VOCABULARY)
    assert crowd.do(portable=1, view=1, scanner=0, hospital=1, letter=0).reports() == crowd.reports()


def test_do_changes_what_the_report_says_of_that_factor_only(crowd):
    some = crowd[:200]
    for before, after in zip(some.do(drain=0).reports(), some.do(drain=1).reports(), strict=True):
        a, b = mentions(before), mentions(after)
        assert a.pop("drain") is None and b.pop("drain") == 1 and a == b


def test_questions_are_true_and_balanced(crowd):
    answers = {name: [] for name in MENTIONED}
    asked_about = {prompts(name)[2]: name for name in MENTIONED}
    for row, asked in zip(crowd.factors.to_dict("records"), question_answers(crowd, seed=1), strict=True):
        for question, answer in asked:
            if question in asked_about:
                name = asked_about[question]
                assert (answer == "yes") == (row[name] == 1)
                answers[name].append(answer == "yes")
            else:
                name = next(n for n in MENTIONED if FACTORS[n].phrase in question)
                assert row[name] == 1 and answer == ("right", "left", "both")[row[f"{name}_side"]]
    for name, yes in answers.items():
        assert 0.35 < np.mean(yes) < 0.65, name
    assert question_answers(crowd[:50], seed=1) != question_answers(crowd[:50], seed=2)


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("no pleural effusion or pneumothorax .", "pneumothorax", 0),
        ("a chest x-ray with left pleural effusion without lung nodule", "effusion", 1),
        ("a chest x-ray with left pleural effusion without lung nodule", "nodule", 0),
        ("heart size is normal .", "cardiomegaly", 0),
        ("the lungs are clear .", "edema", 0),
        ("no acute finding .", "atelectasis", 0),
        ("no pneumothorax . small right apical pneumothorax .", "pneumothorax", 1),
        ("frontal chest radiograph .", "drain", None),
        ("", "effusion", None),
    ],
)
def test_the_parser_reads(text, name, expected):
    assert mentions(text)[name] == expected


def test_one_number_equals_the_array_of_numbers():
    from mechinterp.data.phantom._random import uniform, uniform_one

    index = np.array([0, 1, 77, 10**6])
    assert uniform(5, "text/a", index).tolist() == [uniform_one(5, "text/a", int(i)) for i in index]


def test_names_are_found_where_they_stand():
    text = "No pleural fluid . left chest tube and a central venous catheter , effusions"
    found = {name: [text[a:b] for a, b in spans] for name, spans in named(text).items() if spans}
    assert found == {
        "effusion": ["pleural fluid", "effusions"],
        "drain": ["chest tube"],
        "line": ["central venous catheter"],
    }
