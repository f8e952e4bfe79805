"""Bare references in the model's own style: dressed, and never other words."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from saml_models.text.normalise import normalise
from saml_models.text.style import in_model_style, is_bare

WORDS = (
    "the cat sat on a mat mister mr missus doctor dr saint st o'clock it's don't won't i i'm "
    "he'll colour color grey twenty one two hundred and five thousand first 21 7 half point zero "
    "oh double am pm a.m. percent dollars uh um mm the's cannot gonna wanna nineteen ninety"
)
MARKS = ("", "", "", ".", ",", "?", "!", ";", ":", "...", "-", "'", '"', "%", "$", ")")
words = st.sampled_from(WORDS.split())
bare = st.lists(words.filter(lambda w: "." not in w), max_size=8)


@st.composite
def heard(draw: st.DrawFn, said: list[str]) -> str:
    """What a model could make of `said`: words lost, added, misheard, cased and marked."""
    out = []
    for word in said:
        kind = draw(st.sampled_from(("kept", "kept", "kept", "lost", "changed", "doubled")))
        if kind == "lost":
            continue
        text = draw(words) if kind == "changed" else word
        styled = draw(st.sampled_from((str.lower, str.capitalize, str.upper)))(text)
        out += [styled + draw(st.sampled_from(MARKS))] * (2 if kind == "doubled" else 1)
    return " ".join(out + draw(st.lists(words, max_size=2)))


@settings(max_examples=300, deadline=None)
@given(st.data(), bare, st.booleans())
def test_the_words_stay_the_references(data: st.DataObject, said: list[str], upper: bool) -> None:
    reference = " ".join(said).upper() if upper else " ".join(said)
    hypothesis = data.draw(heard(said))
    assert normalise(in_model_style(reference, hypothesis)) == normalise(reference)


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="abz ' -019", max_size=30), st.text(alphabet="ABz ',.-$%019[](", max_size=30)
)
@example("one", "1.")
@example("a b", "A. B.")
@example("mr", "Mr.")
def test_the_words_stay_whatever_was_heard(reference: str, hypothesis: str) -> None:
    assert normalise(in_model_style(reference, hypothesis)) == normalise(reference)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("I SAW THE CAT", "I saw the cat.", "I saw the cat."),
        ("I SAW THE CAT", "I saw the hat.", "I saw the cat."),
        ("HELLO MISTER SMITH", "Hello, Mr. Smith!", "Hello, Mr. Smith!"),
        ("AT TWENTY ONE", "At 21.", "At 21."),
        ("well he said no", "Well, he said: 'No.'", "Well, he said: 'No.'"),
        ("AND PARIS IS LARGE", "Then London is large.", "And Paris is large."),
        ("THE CAT", "", "The cat"),
        ("YES IT IS", "Yes it is is it is.", "Yes it is."),
        ("LOOK AT THE PATH BELOW US", "Look at the past below.", "Look at the path below us."),
        ("IS IT HE ASKED", "Is it? He asked", "Is it? He asked"),
        ("SHE LIVES IN THE U S A", "She lives in the U.S.A.", "She lives in the U.S.A."),
        ("HE WAITED", "He waited...", "He waited."),
        ("", "Thank you.", ""),
    ],
)
def test_style(reference: str, hypothesis: str, expected: str) -> None:
    assert in_model_style(reference, hypothesis) == expected


def test_a_styled_reference_is_taken_as_it_is() -> None:
    for text in ("I saw the cat.", "Hello there", "i saw the cat."):
        assert not is_bare(text)
        assert in_model_style(text, "Something else.") == text
    for text in ("I SAW", "i saw", "it's", "42", ""):
        assert is_bare(text)
