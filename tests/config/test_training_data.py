"""The data of a resumed run is compared with the data that it was begun with."""

import pytest

from infini_ds.config.training_data import check_fingerprint
from infini_ds.utils.errors import UserError

STREAM = {"shards": "1f2e", "proportion": None, "repeat": None}
BEGUN = {"batch.rows": 4, "data.seed": 0, "streams": [STREAM, STREAM]}


def test_the_same_data_is_accepted():
    check_fingerprint(BEGUN, {**BEGUN, "streams": [dict(STREAM), dict(STREAM)]})


def test_stages_are_compared_one_by_one():
    other = BEGUN | {"streams": [STREAM | {"shards": "0000"}]}
    check_fingerprint({"stages": [BEGUN, other]}, {"stages": [dict(BEGUN), dict(other)]})
    for theirs, ours, words in [
        ({"stages": [BEGUN, other]}, {"stages": [BEGUN, BEGUN]}, r"data.curriculum\[1\].path: the data of this stage"),
        ({"stages": [BEGUN, other]}, {"stages": [BEGUN]}, "names 1 stages, but this run began with 2 stages"),
        (BEGUN, {"stages": [BEGUN]}, "names 1 stages, but this run began with no curriculum"),
        ({"stages": [BEGUN]}, BEGUN, "names no curriculum, but this run began with 1 stages"),
        ({"stages": [BEGUN]}, {"stages": [BEGUN | {"data.seed": 1}]}, "data.seed=1"),
    ]:
        with pytest.raises(UserError, match=words):
            check_fingerprint(theirs, ours)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch.rows": 8}, ["batch.rows=8", "batch.rows=4"]),
        ({"data.seed": 1}, ["data.seed=1", "data.seed=0"]),
        ({"streams": [STREAM]}, ["1 streams of data", "began with 2"]),
        ({"streams": [STREAM, STREAM | {"repeat": 2.0}]}, ["data.streams[1].repeat=2.0"]),
        ({"streams": [STREAM | {"proportion": 0.5}, STREAM]}, ["data.streams[0].proportion=0.5"]),
        ({"streams": [STREAM | {"shards": "0000"}, STREAM]}, ["this run", "other content"]),
        ({"streams": [STREAM, STREAM | {"shards": "0000"}]}, ["stream 1", "other content"]),
    ],
)
def test_other_data_gets_a_sentence(change, words):
    with pytest.raises(UserError) as error:
        check_fingerprint(BEGUN, BEGUN | change)
    sentence = str(error.value)
    assert "\n" not in sentence and all(word in sentence for word in [*words, "another name="]), sentence
