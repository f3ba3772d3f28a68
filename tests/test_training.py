"""The pieces of a training, each against what can be worked out by hand."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgekit.training import Average, class_weights, learning_rate, mixed, parameter_groups

# The rate ---------------------------------------------------------------------------------------------------------


@given(steps=st.integers(1, 300), peak=st.floats(1e-6, 1.0), warmup=st.floats(0, 0.99))
@settings(deadline=None)
def test_the_rate_rises_once_and_falls_once(steps: int, peak: float, warmup: float) -> None:
    rates = [learning_rate(peak, step, steps, warmup) for step in range(1, steps + 1)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(peak) and min(rates) > 0
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_the_rate_by_hand() -> None:
    """Eight steps, two of them warm-up: then cos² of 1/7 .. 6/7 of a right angle."""
    found = [learning_rate(1.0, step, 8, 0.25) for step in (1, 2, 5)]
    assert found == pytest.approx([0.5, 1.0, 0.6112604669781572], abs=1e-12)
    assert found[2] == pytest.approx(math.cos(math.pi / 2 * 3 / 7) ** 2, abs=1e-12)


# Groups -----------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Two stages and a head, and a parameter that is in none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 4))
        self.first = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.second = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)


def test_groups_have_shares_and_no_decay_on_biases_and_norms() -> None:
    model = Small()
    groups = parameter_groups(model, [model.first, model.second, model.head], 0.05, 0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[parameter]: (group["share"], group["weight_decay"]) for group in groups for parameter in group["params"]
    }
    assert found == {
        "head.weight": (1.0, 0.05),
        "head.bias": (1.0, 0.0),
        "second.weight": (0.5, 0.05),
        "second.bias": (0.5, 0.0),
        "first.0.weight": (0.25, 0.05),
        "first.0.bias": (0.25, 0.0),
        "first.1.weight": (0.25, 0.0),
        "first.1.bias": (0.25, 0.0),
        "position": (0.25, 0.05),
    }
    assert sum(len(group["params"]) for group in groups) == len(found)


@given(
    frozen=st.lists(st.booleans(), min_size=9, max_size=9),
    layer_decay=st.floats(0.1, 1.0),
    count=st.integers(0, 3),
)
@settings(deadline=None, max_examples=50)
def test_what_learns_is_in_one_group_and_what_is_frozen_in_none(
    frozen: list[bool], layer_decay: float, count: int
) -> None:
    model = Small()
    for parameter, is_frozen in zip(model.parameters(), frozen, strict=True):
        parameter.requires_grad_(not is_frozen)
    parts = [model.first, model.second, model.head][3 - count :]
    groups = parameter_groups(model, parts, 0.05, layer_decay)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert all(layer_decay ** max(0, count - 1) <= group["share"] <= 1 and group["params"] for group in groups)


# Classes ----------------------------------------------------------------------------------------------------------


def test_class_weights_by_hand() -> None:
    labels = np.array([0, 0, 0, 1])
    assert class_weights(labels, 2, 0.0).tolist() == [1.0, 1.0]
    # 4/3 and 4: on average over the images (3 * 4/3 + 4) / 4 = 2
    assert class_weights(labels, 2, 1.0).tolist() == pytest.approx([2 / 3, 2.0])
    assert class_weights(labels, 3, 1.0).tolist() == pytest.approx([2 / 3, 2.0, 2.0])  # as if it had one image


@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=60), power=st.floats(0, 1))
@settings(deadline=None)
def test_class_weights_are_one_on_average_and_the_rarer_the_greater(labels: list[int], power: float) -> None:
    weights = class_weights(np.array(labels), 6, power)
    assert weights.dtype == torch.float32 and weights.shape == (6,)
    assert float(weights[labels].double().mean()) == pytest.approx(1, rel=1e-5)
    by_count = sorted(range(6), key=lambda label: max(1, labels.count(label)))
    assert all(weights[one] >= weights[other] - 1e-6 for one, other in pairwise(by_count))


# Mixup ------------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 9), alpha=st.floats(0.05, 4), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_rows_are_mixed_with_their_partners(count: int, alpha: float, seed: int) -> None:
    """All the inputs alike, so that of several maps each row's belong together."""
    maps, vectors = torch.randn(count, 2, 3, 3), torch.randn(count, 5)
    (some, others), partners, share = mixed((maps, vectors), alpha, np.random.default_rng(seed))
    assert 0.5 <= share <= 1
    assert sorted(partners.tolist()) == list(range(count))
    for row, partner in enumerate(partners):
        torch.testing.assert_close(some[row], share * maps[row] + (1 - share) * maps[partner])
        torch.testing.assert_close(others[row], share * vectors[row] + (1 - share) * vectors[partner])


def test_mixing_is_repeated_by_the_same_seed() -> None:
    rows = torch.randn(8, 4)
    draws = [mixed((rows,), 0.4, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0][0][0], draws[1][0][0]) and draws[0][1].tolist() == draws[1][1].tolist()
    assert draws[0][2] == draws[1][2] != draws[2][2]


# The running average ----------------------------------------------------------------------------------------------


def plain_average(rows: list[list[float]], decay: float) -> list[float]:
    """rows: the values before the first step, then after each."""
    kept = list(rows[0])
    for number, row in enumerate(rows[1:], start=1):
        own = min(decay, (1 + number) / (10 + number))
        kept = [own * one + (1 - own) * other for one, other in zip(kept, row, strict=True)]
    return kept


@given(
    rows=st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=1, max_size=30),
    decay=st.sampled_from([0.1, 0.5, 0.95]),
    cut=st.integers(0, 30),
)
@settings(deadline=None)
def test_the_average_is_that_of_a_plain_loop(rows: list[list[float]], decay: float, cut: int) -> None:
    """Also where it is saved after some of the steps and goes on in a new one."""
    live = {"w": torch.tensor(rows[0], dtype=torch.float64), "count": torch.tensor(0)}
    average = Average(live, decay)
    for number, row in enumerate(rows[1:], start=1):
        if number == cut:
            saved = {name: value.clone() for name, value in average.values.items()}
            average = Average(live, decay, steps=number - 1)
            average.load(saved)
        live["w"].copy_(torch.tensor(row, dtype=torch.float64))
        live["count"] += 1
        average.update()
    assert average.values["w"].tolist() == pytest.approx(plain_average(rows, decay), abs=1e-9)
    assert average.values["count"].item() == len(rows) - 1
    assert average.values["count"].dtype == torch.int64


def copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("fails", [False, True])
def test_within_it_the_network_has_the_averages_and_after_it_its_own(fails: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(3))
    average = Average(model.state_dict(), 0.9)
    model(torch.randn(4, 2, 5, 5))  # moves BatchNorm's statistics
    with torch.no_grad():
        model[0].weight.add_(1.0)
    average.update()
    own, averages = copies(model.state_dict()), copies(average.values)
    assert not same(own, averages) and own["1.num_batches_tracked"].item() == 1
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext(), average.in_place():
        assert same(model.state_dict(), averages)
        if fails:
            raise KeyboardInterrupt
    assert same(model.state_dict(), own) and same(average.values, averages)


def test_loading_needs_all_the_averages() -> None:
    average = Average({"a": torch.zeros(2), "b": torch.zeros(1)}, 0.9)
    average.load({"a": torch.ones(2), "b": torch.ones(1), "more": torch.ones(3)})
    assert average.values["a"].tolist() == [1, 1] and average.values["b"].tolist() == [1]
    with pytest.raises(KeyError):
        average.load({"a": torch.ones(2)})
