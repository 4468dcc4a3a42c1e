"""Messages: data until somebody reads them."""

from __future__ import annotations

import json

import pytest

from amg_core import messages
from amg_core.messages import message, words


def test_words_of_a_message():
    assert words(message("no_copy")) == "no copy"
    assert words(message("closest", score=0.1, limit=0.4)) == "likeness 0.10, copy above 0.4"
    assert words(message("seen", score=-0.5)) == "likeness −0.50"
    assert words(message("still_a_copy_more", pictures=[1, 3])) == "STILL A COPY: pictures 1, 3"
    assert (
        words([message("not_judged"), message("not_ended")]) == "not checked · the run did not end"
    )
    reason = message("as_written", words="it is - so")
    assert words(message("cannot_tell", reason=reason)) == "Cannot tell: it is - so"


def test_what_is_put_in_is_never_a_place_itself():
    assert words(message("copy_of_row", row="<row>")) == "A copy of picture <row> of the index"


def test_other_languages_and_those_that_there_are_not():
    report = message("key_words", parts=[message("key_word", words="a-b", drop=1.25)])
    assert words(report, "de") == "Triggerwörter: „a-b“ (−1.2)"
    for unknown in ("xx", "", "../en", "en/../de"):
        assert words(report, unknown) == words(report) == "trigger words: “a-b” (−1.2)"


def test_json():
    report = message("cannot_tell_of", picture=2, reason=message("flat"))
    assert report.to_json() == {"code": "cannot_tell_of", "picture": 2, "reason": {"code": "flat"}}
    assert messages.to_json([report]) == json.loads(json.dumps([report.to_json()]))


@pytest.mark.parametrize(
    ("code", "values"), [("nothing", {}), ("no_copy", {"more": 1}), ("seen", {"closenes": 1.0})]
)
def test_only_what_has_a_sentence_can_be_told(code, values):
    with pytest.raises(ValueError, match=code):
        message(code, **values)
