"""Errors on own words are told apart from those on all others."""

from bench.accuracy.own_words import wrong


def test_errors_are_counted_where_they_are():
    said = ["ten minims of it", "the best emetic", "ann"]
    heard = ["ten minutes of", "the very best emetic", ""]
    # minims is another word, it is missing, very is one more, ann is missing.
    assert wrong(said, heard, {"minims", "emetic", "ann"}) == (2, 3, 2, 5)
    assert wrong(said, said, {"ann"}) == (0, 1, 0, 7)
