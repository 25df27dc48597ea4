"""Independent random streams, each a function of a few integers: a resumed run needs no generator states."""

from enum import IntEnum

import numpy as np
import torch

_FIRST_TRAINING_SEED = 2**32


class Stream(IntEnum):
    """What a run draws, each the second integer of its key, after the run's seed."""

    STARTS = 0
    POLICY = 1
    UPDATES = 2
    WINDOW = 3
    PROMPTS = 4
    DATA = 5


def derived_seed(*key: int) -> int:
    """Return a seed below 2**62 that is a hash of the key.

    Streams of different keys are independent, unless the keys differ in nothing but zeros at their ends.
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(2))


def training_seed(*key: int) -> int:
    """Return a derived seed of at least 2**32: all smaller seeds are held out from training.

    Note:
        torch's CPU generator keeps only the low 32 bits of a seed, so that a training seed and a smaller one may by
        chance give the same noise, with a probability of 2**-32 a pair.
    """
    return _FIRST_TRAINING_SEED + derived_seed(*key) // 2


def derived_generator(*key: int) -> torch.Generator:
    """Return a CPU generator that starts from a seed derived from the key."""
    return torch.Generator().manual_seed(derived_seed(*key, 1))


def round_robin(count: int, position: int, *key: int) -> int:
    """Return the index, in [0, count), at a position of an endless sequence of indices.

    The sequence is made of passes: each pass has every index once, in an order shuffled for this pass.

    Args:
        count: The number of indices.
        position: The place in the sequence, from 0.
        key: Integers that the shuffles are a function of.
    """
    pass_number, place = divmod(position, count)
    return int(np.random.default_rng(derived_seed(*key, pass_number)).permutation(count)[place])
