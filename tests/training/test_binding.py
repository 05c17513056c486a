"""What the short convolution is for: the memory learns to bind a key to a value in the order in which people write."""

from binding import VARIANTS, accuracy, build, examples, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from infini_ds.model.loss import IGNORE_INDEX

STEPS = 400  # enough for each seed that was tried (docs/recall.md)


@given(st.sampled_from(["key", "value", "both"]), st.integers(0, 3), st.integers(0, 2**16))
@settings(deadline=None, max_examples=20, derandomize=True)
def test_answers_follow_from_the_facts(order, segments, seed):
    """Read from left to right: the two words of a fact are neighbors, in one segment, and the answer is its value."""
    ids, labels = examples(Generator().manual_seed(seed), 3, order, segments)
    for row, answers in zip(ids.tolist(), labels.tolist(), strict=True):
        words = [(at, token) for at, token in enumerate(row[: row.index(40)]) if token < 32]
        assert len(words) == 8 and words[7][0] // 20 == words[0][0] // 20 == 0
        pairs = [sorted((words[i][1], words[i + 1][1])) for i in range(0, 8, 2)]
        assert all(key < 16 <= value for key, value in pairs)
        asked = [(row[at - 1], token) for at, token in enumerate(answers) if token != IGNORE_INDEX]
        assert sorted(asked) == sorted(map(tuple, pairs))
        assert all(at // 20 == segments for at, token in enumerate(answers) if token != IGNORE_INDEX)


def test_facts_in_natural_order_are_recalled_after_16_segments():
    model = build("even", seed=0)
    losses = train(model, "key", seed=0, steps=STEPS, rate=5e-3)
    assert losses[0] > 3 and sum(losses[-20:]) / 20 < 0.2
    assert accuracy(model, "key", 16) > 0.9
    assert max(accuracy(model, "key", 16, memory) for memory in ("off", "other")) < 0.2


def test_without_a_convolution_the_memory_knows_the_values_but_not_whose_they_are():
    model = build("none", seed=0)
    train(model, "key", seed=0, steps=STEPS, rate=5e-3)
    assert 0.15 < accuracy(model, "key", 1) < 0.6


def test_every_variant_trains_what_it_says():
    moved = {}
    for variant in VARIANTS:
        model = build(variant, seed=0)
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        train(model, "key", seed=0, steps=3, rate=5e-3)
        after = dict(model.named_parameters())
        moved[variant] = {name.rpartition("attention.")[2] for name in before if (after[name] != before[name]).any()}
    convolutions = {
        name: {x for x in names if "short_conv" in x or x == "q_proj.weight"} for name, names in moved.items()
    }
    both, queries = {"short_conv.k", "short_conv.v"}, {"q_proj.weight"}
    assert convolutions == {
        "none": queries,
        "even": both | queries,
        "identity": both | queries,
        "k": {"short_conv.k"} | queries,
        "v": {"short_conv.v"} | queries,
        "q": both | queries,  # the convolution's own weight, and not the projection's, has this name
    }
