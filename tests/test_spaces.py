"""Tests of the spaces and of packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rledit_env import spaces
from rledit_env.lm.editable import Trace

SHAPES = {"a.up": (3, 5), "b.down": (5, 3)}
CPU = torch.device("cpu")


def trace(rows: int) -> Trace:
    return Trace(
        keys={m: torch.randn(rows, d_in) for m, (d_in, _) in SHAPES.items()},
        value_gradients={m: torch.randn(rows, d_out) for m, (_, d_out) in SHAPES.items()},
        owner=torch.zeros(rows, dtype=torch.long),
        loss=1.5,
        hardest=torch.full((1,), 2.0),
        sums=torch.full((1,), 3.0),
        answers=torch.full((1,), 2.0),
    )


def action(rows: int, kind=np.float32):
    rng = np.random.default_rng(0)
    return {
        part: {m: rng.normal(size=(rows, shape[side])).astype(kind) for m, shape in SHAPES.items()}
        for part, side in (("keys", 0), ("values", 1))
    }


def unpack(given, padded=6, used=4):
    return spaces.unpack_action(given, SHAPES, padded, used, CPU)


def test_a_padded_observation_is_in_its_space_with_zero_rows_at_the_end():
    whole = trace(4)
    observation = spaces.numpy_observation(spaces.torch_observation(whole, 0.25), 6)
    assert observation in spaces.observation_space(SHAPES, 6)
    assert observation["mask"].tolist() == [1, 1, 1, 1, 0, 0]
    assert (float(observation["edit_loss"][0]), float(observation["progress"][0])) == (1.5, 0.25)
    for m in SHAPES:
        np.testing.assert_array_equal(observation["keys"][m][:4], whole.keys[m].numpy())
        np.testing.assert_array_equal(observation["value_gradients"][m][:4], whole.value_gradients[m].numpy())
        assert not observation["keys"][m][4:].any() and not observation["value_gradients"][m][4:].any()


def test_the_observation_after_the_last_batch_is_in_the_space_and_empty():
    observation = spaces.numpy_observation(spaces.empty_observation(SHAPES, 1.0, CPU), 6)
    assert observation in spaces.observation_space(SHAPES, 6)
    assert not observation["mask"].any() and not observation["edit_loss"].any()


def test_the_spaces_have_inputs_on_the_key_side_and_outputs_on_the_value_side():
    observed, acted = spaces.observation_space(SHAPES, 6), spaces.action_space(SHAPES, 6)
    assert {m: (acted["keys"][m].shape, acted["values"][m].shape) for m in SHAPES} == {
        "a.up": ((6, 3), (6, 5)),
        "b.down": ((6, 5), (6, 3)),
    }
    assert all(observed["value_gradients"][m].shape == acted["values"][m].shape for m in SHAPES)


@pytest.mark.parametrize("kind", [np.float32, np.float64, "tensor", "list"])
@pytest.mark.parametrize("rows", [6, 4])
def test_arrays_tensors_and_lists_are_taken_padded_or_with_the_rows_in_use(rows, kind):
    given = action(rows)
    convert = {"tensor": torch.from_numpy, "list": np.ndarray.tolist}.get(kind, lambda a: a.astype(kind))
    keys, values = unpack({part: {m: convert(a) for m, a in of.items()} for part, of in given.items()})
    for m in SHAPES:
        assert keys[m].dtype == values[m].dtype == torch.float32
        np.testing.assert_array_equal(keys[m].numpy(), given["keys"][m][:4])
        np.testing.assert_array_equal(values[m].numpy(), given["values"][m][:4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: None, "the action is NoneType"),
        (lambda a: {"keys": a["keys"]}, r"the action is \['keys'\]"),
        (lambda a: {**a, "mask": 1}, "the action is"),
        (
            lambda a: {**a, "keys": 3},
            r"action\['keys'\] must have exactly the edited modules; missing: \['a.up', 'b.down'\]",
        ),
        (lambda a: {**a, "values": {"a.up": a["values"]["a.up"]}}, r"missing: \['b.down'\]"),
        (lambda a: {**a, "values": {**a["values"], "c": 1}}, r"unknown: \['c'\]"),
    ],
)
def test_an_action_without_the_right_parts_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        unpack(change(action(6)))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((6, 4)), r"\['b.down'\] has shape \(6, 4\); it must be \(6, 3\)"),
        (np.zeros((5, 3)), r"has shape \(5, 3\); it must be \(6, 3\).* or \(4, 3\), the rows in use"),
        (np.zeros((7, 3)), r"has shape \(7, 3\)"),
        (np.zeros(3), r"has shape \(3,\)"),
        (np.zeros((1, 6, 3)), r"has shape \(1, 6, 3\)"),
        (np.full((6, 3), np.nan), r"\['b.down'\] holds a number that is not finite \(first in row 0\)"),
        (np.array([[0.0] * 3] * 2 + [[0.0, np.inf, 0.0]] + [[0.0] * 3] * 3), "not finite .first in row 2"),
        (np.array([[0.0] * 3] * 3 + [[0.0, -np.inf, 0.0]] + [[0.0] * 3] * 2), "not finite .first in row 3"),
        (np.full((6, 3), 1e300), "not finite"),
        ("abc", r"\['b.down'\] is no array of numbers"),
        (None, r"\['b.down'\] is no array of numbers"),
        ([[0.0] * 3, [0.0]], r"\['b.down'\] is no array of numbers"),
        (np.full((6, 3), "x", dtype=object), r"\['b.down'\] is no array of numbers"),
    ],
)
def test_a_bad_array_is_named_by_part_and_module(array, message):
    given = action(6)
    given["values"]["b.down"] = array
    with pytest.raises(ValueError, match=r"action\['values'\].*" + message.removeprefix(r"\['b.down'\]")):
        unpack(given)


def test_whatever_stands_in_padded_rows_is_ignored():
    given = action(6)
    for factors in given.values():
        for array in factors.values():
            array[4:] = 1e30
    keys, _ = unpack(given)
    assert float(max(k.abs().max() for k in keys.values())) < 10
