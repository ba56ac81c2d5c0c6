import numpy as np
import pytest

from rledit_env.knowledge import KnowledgeStream, load_knowledge


def row(number: int) -> dict:
    return {
        "src": f"question {number}?",
        "rephrase": f"rephrased {number}?",
        "ans": "aircraft",
        "loc": "nq question: who wrote hamlet",
        "loc_ans": "Shakespeare",
    }


@pytest.fixture
def dataset():
    return load_knowledge("zsre", [row(i) for i in range(10)])


def test_a_data_set_is_a_sequence_of_its_records(dataset):
    assert len(dataset) == 10
    assert dataset[2].prompt == "question 2?"
    assert [record.prompt for record in dataset[8:]] == ["question 8?", "question 9?"]
    assert dataset[3] in dataset


def test_a_stream_draws_distinct_records(dataset):
    stream = KnowledgeStream(dataset, num_batches=3, batch_size=3)
    stream.reset(np.random.default_rng(0))
    seen = [record.prompt for t in range(3) for record in stream.batch(t)]
    assert len(set(seen)) == 9
    assert seen == [dataset[i].prompt for i in stream.indices]


def test_the_same_seed_gives_the_same_stream_and_another_seed_another(dataset):
    orders = []
    for seed in (0, 0, 1):
        stream = KnowledgeStream(dataset, 5, 2)
        stream.reset(np.random.default_rng(seed))
        orders.append(stream.indices.tolist())
    assert orders[0] == orders[1] != orders[2]


def test_every_reset_draws_afresh_from_the_whole_data_set(dataset):
    stream, rng, drawn = KnowledgeStream(dataset, 1, 2), np.random.default_rng(0), set()
    for _ in range(50):
        stream.reset(rng)
        drawn.update(stream.indices.tolist())
    assert drawn == set(range(10))


@pytest.mark.parametrize("indices", [[7, 0, 3, 9], (7, 0, 3, 9), np.array([7, 0, 3, 9], dtype=np.uint8)])
def test_given_indices_are_taken_in_order_without_drawing(dataset, indices):
    stream, rng = KnowledgeStream(dataset, 2, 2), np.random.default_rng(0)
    before = rng.bit_generator.state
    stream.reset(rng, indices)
    assert rng.bit_generator.state == before
    assert [record.prompt for record in stream.batch(1)] == ["question 3?", "question 9?"]


def test_a_stream_keeps_its_own_copy_of_the_given_indices(dataset):
    stream, given = KnowledgeStream(dataset, 2, 2), np.array([7, 0, 3, 9])
    stream.reset(np.random.default_rng(0), given)
    given[:] = 0
    assert stream.indices.tolist() == [7, 0, 3, 9]
    with pytest.raises(ValueError, match="read-only"):
        stream.indices[0] = 1


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 1, 2, 10], "index 10 is out of range; the data set has records 0 to 9"),
        ([0, 1, 2, -1], "index -1 is out of range"),
        ([0, 1, 2, 2**70], "indices are"),
        ([0, 1, 2], "there are 3 indices; 2 batches of 2 take 4"),
        ([], "there are 0 indices"),
        ([0, 1, 2, 1], "index 1 is given more than once"),
        ([0, 1, 2, 3.0], "flat sequence of integers"),
        ([True, False, True, False], "flat sequence of integers"),
        (["0", "1", "2", "3"], "flat sequence of integers"),
        ([[0, 1], [2, 3]], "flat sequence of integers"),
        ([[0, 1], [2]], "flat sequence of integers"),
        (3, "flat sequence of integers"),
    ],
)
def test_bad_indices_are_named_and_leave_the_stream_as_it_was(dataset, indices, message):
    stream, rng = KnowledgeStream(dataset, 2, 2), np.random.default_rng(0)
    stream.reset(rng)
    order, state = stream.indices.tolist(), rng.bit_generator.state
    with pytest.raises(ValueError, match=message):
        stream.reset(rng, indices)
    assert (stream.indices.tolist(), rng.bit_generator.state) == (order, state)


def test_a_data_set_too_small_for_the_stream_names_the_numbers(dataset):
    with pytest.raises(ValueError, match="4 batches of 3 need 12 records, but list of 10 dictionaries .train. has 10"):
        KnowledgeStream(dataset, 4, 3)


@pytest.mark.parametrize(("batches", "size"), [(0, 1), (1, -2), (1.0, 2), (True, 2)])
def test_batch_counts_and_sizes_are_positive_integers(dataset, batches, size):
    with pytest.raises(ValueError, match="give a positive integer"):
        KnowledgeStream(dataset, batches, size)


@pytest.mark.parametrize("t", [-1, 2])
def test_a_batch_outside_the_stream_is_an_error(dataset, t):
    stream = KnowledgeStream(dataset, 2, 2)
    stream.reset(np.random.default_rng(0))
    with pytest.raises(IndexError, match=f"batch {t} does not exist; the stream has batches 0 to 1"):
        stream.batch(t)


def test_a_batch_before_the_first_reset_is_an_error(dataset):
    with pytest.raises(RuntimeError, match="call reset first"):
        KnowledgeStream(dataset, 2, 2).batch(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "squad"}, "kind 'squad' is unknown; it is one of zsre, counterfact, fever"),
        ({"split": "holdout"}, "split 'holdout' is unknown"),
        ({"on_error": "ignore"}, "on_error 'ignore' is unknown"),
    ],
)
def test_an_unknown_argument_is_named_with_those_known(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_knowledge(**{"kind": "zsre", "data": [row(0)]} | arguments)
