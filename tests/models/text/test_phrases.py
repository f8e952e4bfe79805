"""Names and terms in a file, which may be anything."""

import pytest

from saml_kernels import SAMLError
from saml_models.text.phrases import LARGEST, LONGEST, MOST, phrases_of, read_phrases


def test_one_a_line_each_once(tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes(
        b"\xef\xbb\xbfJos\xc3\xa9  Mu\xc3\xb1oz\r\n\r\n apomorphine\nJos\xc3\xa9 Mu\xc3\xb1oz\n"
    )
    assert read_phrases(file) == ["José Muñoz", "apomorphine"]
    assert phrases_of(str(file)) == phrases_of([" José Muñoz", "apomorphine "])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\n \n", "holds no words"),
        (b"ann\n\xff\n", "UTF-8"),
        (b"a\x00b", "phrase 1 has a control character"),
        (b"ann\n---\n", "phrase 2, '---'"),
        (b"x" * (LONGEST + 1), "characters"),
        (b"\n".join(b"w%d" % i for i in range(MOST + 1)), f"over {MOST} phrases"),
        (b"\n" * (LARGEST + 1), f"over {LARGEST} bytes"),
    ],
)
def test_what_is_no_list_of_words_is_refused(tmp_path, content, reason):
    file = tmp_path / "names.txt"
    file.write_bytes(content)
    with pytest.raises(SAMLError, match=reason) as told:
        read_phrases(file)
    assert str(file) in str(told.value) and "\n" not in str(told.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SAMLError, match="cannot be read"):
        read_phrases(tmp_path / "nobody.txt")
