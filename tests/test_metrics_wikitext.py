"""WikiText's markup: planted pieces of text with their known originals."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compressor.metrics.wikitext import articles, detokenise, is_wikitext, words_begun

FILE = (
    " \n = First = \n \n It cost 1 @,@ 250 @.@ 5 , or so , in a well @-@ known shop . \n \n = = Part = = \n \n"
    ' More ( much more ) . \n \n = Second = \n \n " Yes " , he said : no ; why ? \n'
)


@pytest.mark.parametrize(
    ("split", "joined"),
    [
        ("a well @-@ known 1 @,@ 250 @.@ 5", "a well-known 1,250.5"),
        ("one , two ; three : four . Five ! Six ? Seven", "one, two; three: four. Five! Six? Seven"),
        ("( in brackets ) [ and these ] { and those }", "(in brackets) [and these] {and those}"),
        ('he said " a word " aloud', 'he said "a word" aloud'),
        ("the girl 's and the girls ' book", "the girl's and the girls' book"),
        (" = = = Deep = = = ", " === Deep === "),
        (" = = = = Deeper = = = = ", " ==== Deeper ==== "),
        ("20 ° C", "20°C"),
        ("line \n next", "line\nnext"),
        ("N is N here", "N is 1 here"),
        ("nothing to do", "nothing to do"),
    ],
)
def test_detokenise(split, joined):
    assert detokenise(split) == joined


def test_articles_of_a_file_and_of_its_rows_are_the_same():
    from_file = articles([FILE])
    rows = ["" if not line.strip() else line + "\n" for line in FILE.split("\n")[:-1]]  # as the hub stores them
    from_rows = articles(rows)
    assert [text.split()[:3] for text in from_file] == [["=", "First", "="], ["=", "Second", "="]]
    assert "= = Part = =" in from_file[0]
    assert [detokenise(text) for text in from_rows] == [detokenise(text) for text in from_file]


def test_wikitext_is_recognised_and_prose_is_not():
    assert is_wikitext([FILE]) and is_wikitext(["x", "a well @-@ known one"]) and is_wikitext([" = Title = \n"])
    assert not is_wikitext(["He said = no. Mail me @ home.", "a == b\n= x", "== heading =="])


def test_words_begun_counts_words_of_the_original():
    original = 'It cost 1 @,@ 250 " or so " in a well @-@ known shop .'
    shown = detokenise(original)
    words = original.split()
    assert words_begun(original, shown) == len(words)
    assert words_begun(original, "") == 0
    assert words_begun(original, "It cost 1") == 3
    assert words_begun(original, "It cost 1,2") == 5  # the fifth word, 250, has begun
    assert [words_begun(original, shown[:end]) for end in range(len(shown))] == sorted(
        words_begun(original, shown[:end]) for end in range(len(shown))
    )


def test_real_wikitext_keeps_its_visible_characters():
    folder = os.environ.get("GPT2_COMPRESS_TEST_DATA")
    if not folder:
        pytest.skip("GPT2_COMPRESS_TEST_DATA is not set")
    text = (Path(folder) / "data" / "wikitext-2" / "validation.txt").read_text(encoding="utf-8")
    pages = articles([text])
    assert len(pages) == 60 and "\n".join(pages).split() == text.split()  # 60 articles, nothing lost
    for page in pages:
        assert words_begun(page, detokenise(page)) == len(page.split())
    assert " @-@ " not in detokenise(text)
