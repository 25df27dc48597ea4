"""What is constant within an episode is kept once where episodes share it, and read as if it were kept for each."""

import numpy as np
import torch

from agents.experience.constants import Constants, DistinctRows


def test_rows_are_read_by_episodes():
    values, rows = torch.arange(6.0).reshape(3, 2), torch.tensor([2, 0, 0, 1])
    constants = Constants(values, rows)
    assert torch.equal(constants[:], values[rows])
    assert torch.equal(constants[torch.tensor([3, 0])], values[[1, 2]])
    for some in (slice(1, 3), torch.tensor([3, 0])):
        part = constants.part(some)
        assert part.values is values
        assert torch.equal(part[:], constants[some])


def test_a_plain_row_for_each_episode_is_taken_too():
    values = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    constants = Constants.of(values)
    assert torch.equal(constants[:], values)
    assert Constants.of(constants) is constants


def test_constants_are_those_of_each_episode():
    """Embeddings once per prompt, a negative one once, anything else for each episode: all read the same."""
    ids = np.array([3, 1, 3, -1]), np.array([1, 0, -1, 3])
    expected = {"prompt_id": [], "prompt_embeds": [], "negative_prompt_embeds": [], "mask": []}
    rows = DistinctRows()
    for batch, prompt_id in enumerate(ids):
        embeds = torch.from_numpy(prompt_id).float()[:, None] + torch.tensor([0.0, 0.5])
        embeds[prompt_id < 0] += 100 * (batch + 1)  # two texts outside of the set differ
        observed = {
            "prompt_id": torch.from_numpy(prompt_id)[:, None],
            "prompt_embeds": embeds,
            "negative_prompt_embeds": torch.full((4, 2), 7.0),
            "mask": torch.arange(4) + 10 * batch,
        }
        rows.add(observed, prompt_id)
        for key, values in observed.items():
            expected[key].append(values)
    built = rows.build()
    for key, values in expected.items():
        assert torch.equal(built[key][:], torch.cat(values)), key
    assert {key: len(value.values) for key, value in built.items()} == {
        "prompt_id": 8,
        "prompt_embeds": 5,
        "negative_prompt_embeds": 1,
        "mask": 8,
    }


def test_nothing_constant_is_nothing():
    rows = DistinctRows()
    rows.add({}, np.array([0, 1]))
    assert rows.build() == {}
