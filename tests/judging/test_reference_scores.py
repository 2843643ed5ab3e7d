"""Scores against the reference, calculated by hand."""

import pytest

from gptpl.judging.responses import Answer, reference_scores


def scores(output: str, answer: str):
    given = Answer(index=0, instruction="i", input="", output=output, model_response=answer, fields={})
    return reference_scores(given, markers=["### Response", "<|"])


@pytest.mark.parametrize(
    ("output", "answer", "exact", "f1", "rouge"),
    [
        ("The sky is blue.", "the  sky is blue", 1, 1, 1),
        ("The sky is blue.", "A sky is blue!", 1, 1, 0.75),  # ROUGE counts articles
        # SQuAD: 2 of 3 and 2 of 2 words without articles; ROUGE: 2 in order of 4 and 2
        ("The sky is blue.", "sky blue", 0, 0.8, 2 / 3),
        # the same words in another order: 3 of 3 and 3 of 3; the longest in order: 2 of 4 and 2 of 3
        ("The sky is blue.", "blue is sky", 0, 1, 2 / 7),
        # a word given twice counts once: 1 of 2, 1 of 1; ROUGE the same
        ("yes", "yes yes", 0, 2 / 3, 2 / 3),
        ("The sky is blue.", "", 0, 0, 0),
        ("", "", 1, 1, 0),
        ("", "words", 0, 0, 0),
        ("red", "green", 0, 0, 0),
        ("赤", "赤", 1, 1, 0),  # ROUGE sees letters a to z alone
    ],
)
def test_words_in_common(output, answer, exact, f1, rouge):
    found = scores(output, answer)
    assert (found["exact_match"], found["token_f1"]) == (exact, pytest.approx(f1))
    assert found["rouge_l"] == pytest.approx(rouge)


@pytest.mark.parametrize(
    ("answer", "well_formed"),
    [("Blue.", 1), ("", 0), (" \n\t", 0), ("Blue.\n### Response:\nBlue.", 0), ("Blue.<|endoftext|>", 0)],
)
def test_an_answer_is_well_formed_without_the_templates_markers(answer, well_formed):
    assert scores("Blue.", answer)["well_formed"] == well_formed


def test_an_answer_that_its_model_never_ended_is_not_well_formed():
    given = Answer(
        index=0,
        instruction="i",
        input="",
        output="Blue.",
        model_response="Blue and blue and",
        fields={"well_formed": False},
    )
    assert reference_scores(given, markers=["### Response"])["well_formed"] == 0
