"""The position of a loader in its epoch, with batches that are objects."""

import pytest
from streaming_forks import run_in_fork

CODE = """
class Batch:
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, rows):
        return Batch([self.rows[rows]])

{imports}
loader = {loader}(StreamingDataset(local=folder, split="train", batch_size=4), batch_size=4, collate_fn=Batch)
next(iter(loader))
result = loader.state_dict()["sample_in_epoch"]
"""
OURS = "from infini_ds.streaming_compat.loader import BatchLoader"


@pytest.mark.parametrize(
    ("imports", "loader", "rows"), [("", "StreamingDataLoader", 1), (OURS, "BatchLoader", 4)], ids=["plain", "ours"]
)
def test_rows_of_a_batch_object(imports, loader, rows, written):
    assert run_in_fork(CODE.format(imports=imports, loader=loader), folder=str(written)) == rows


def test_plain_streaming_ignores_a_state_that_is_loaded_after_the_first_batch(written):
    """For which `TrainingStream.at` makes a new dataset."""
    code = """
    def open_loader():
        return StreamingDataLoader(StreamingDataset(local=folder, split="train", batch_size=2), batch_size=2)

    def first_rows(loader):
        return next(iter(loader))["input_ids"][:, 0].tolist()

    loader = open_loader()
    assert first_rows(loader) == [0, 1]
    state = loader.state_dict()
    loader.load_state_dict(state)
    other = open_loader()
    other.load_state_dict(state)
    result = [first_rows(loader), first_rows(other)]
    """
    assert run_in_fork(code, folder=str(written)) == [[0, 1], [2, 3]]


def test_plain_streaming_resumes_the_end_of_an_epoch_with_an_empty_one(written):
    """Which `TrainingStream` skips."""
    code = """
    def open_loader():
        return StreamingDataLoader(StreamingDataset(local=folder, split="train", batch_size=2), batch_size=2)

    loader, other = open_loader(), open_loader()
    batches = len(list(loader))
    other.load_state_dict(loader.state_dict())
    result = [batches, len(list(other)), len(list(other))]
    """
    assert run_in_fork(code, folder=str(written)) == [150, 0, 150]
