"""Independent random streams, each a function of a few integers: a resumed run needs no generator states."""

import numpy as np
import torch

_FIRST_TRAINING_SEED = 2**32


def derived_seed(*key: int) -> int:
    """Return a seed that is a hash of the key: streams of keys that differ in more than final zeros are independent."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(2))


def training_seed(*key: int) -> int:
    """Return a derived seed that is at least 2**32, so that all smaller seeds are held out from training.

    torch's CPU generator keeps the low 32 bits alone: a smaller seed's noise may be met by chance, 2**-32 a pair.
    """
    return _FIRST_TRAINING_SEED + derived_seed(*key) // 2


def in_turn(count: int, turn: int, *key: int) -> int:
    """Return whose turn it is of `count` things that take turns, in an order that the key shuffles for every pass."""
    pass_number, place = divmod(turn, count)
    return int(np.random.default_rng(derived_seed(*key, pass_number)).permutation(count)[place])


def derived_generator(*key: int) -> torch.Generator:
    """Return a CPU generator that starts from the derived seed of the key."""
    return torch.Generator().manual_seed(derived_seed(*key, 1))
