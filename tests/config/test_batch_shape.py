"""The rows of a step, divided over data ranks, accumulation and micro-batches."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infini_ds.config.batch_shape import batch_shape
from infini_ds.config.recipe import BatchSection
from infini_ds.utils.errors import UserError

many = settings(deadline=None, derandomize=True)


@many
@given(rows=st.integers(1, 64), data_size=st.integers(1, 8), micro_rows=st.integers(1, 16))
def test_batch_is_divided_without_rest(rows, data_size, micro_rows):
    batch = BatchSection(rows=rows, micro_rows=micro_rows)
    if rows % data_size:
        with pytest.raises(UserError, match=f"batch.rows={rows} cannot be divided over {data_size} ranks"):
            batch_shape(batch, 128, data_size)
        return
    shape = batch_shape(batch, 128, data_size)
    assert shape.data_size * shape.accumulation * shape.micro_rows == rows
    assert shape.micro_rows <= micro_rows


@many
@given(rows=st.integers(1, 64), data_size=st.integers(2, 8))
def test_the_suggested_batch_can_be_divided(rows, data_size):
    if rows % data_size == 0:
        return
    with pytest.raises(UserError) as error:
        batch_shape(BatchSection(rows=rows), 128, data_size)
    words, _, suggested = str(error.value).rpartition("batch.rows=")
    assert batch_shape(BatchSection(rows=int(suggested)), 128, data_size).rows == int(suggested)
    sequence = int(words.partition("parallel.sequence=")[2].partition(",")[0])
    assert data_size % sequence == 0 and batch_shape(BatchSection(rows=rows), 128, data_size // sequence, sequence)


def test_batch_in_tokens():
    assert batch_shape(BatchSection(tokens=1000, micro_rows=4), 256, 1).rows == 3
    with pytest.raises(UserError, match=r"batch.tokens=100 is less than one row of 256 tokens"):
        batch_shape(BatchSection(tokens=100), 256, 1)
