"""Streams are functions of their keys."""

import numpy as np
import pytest
import torch

from agents.experience.seeding import derived_generator, derived_seed, round_robin, training_seed


def test_a_seed_is_a_function_of_its_key():
    keys = [(0, 1), (1, 0, 5), (0, 1, 5), (1, 1), (0, 2)]
    assert len({derived_seed(*key) for key in keys}) == len(keys)
    assert derived_seed(0, 1, 5) == derived_seed(0, 1, 5)
    assert all(0 <= derived_seed(*key) < 2**62 for key in keys)


def test_training_seeds_leave_the_small_ones_to_evaluation():
    assert all(2**32 <= training_seed(run, 0, episode) < 2**63 for run in range(4) for episode in range(8))


def test_a_generator_is_not_the_one_that_its_seed_makes():
    """The noise of an episode, drawn from its seed, and the policy's draws, from the same key, differ."""
    one, again = (torch.randn(4, generator=derived_generator(3)) for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, torch.randn(4, generator=torch.Generator().manual_seed(derived_seed(3))))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_round_robin_takes_each_index_once_per_pass(count):
    sequence = np.array([round_robin(count, position, 5) for position in range(20 * count)]).reshape(20, count)
    assert (np.sort(sequence) == np.arange(count)).all()
    assert count < 7 or len({tuple(one) for one in sequence.tolist()}) > 15
    assert count < 7 or sequence.ravel().tolist() != [round_robin(count, position, 6) for position in range(20 * count)]
