import math

import numpy as np
import pytest
import torch

from agents.logs.diagnostics import effective_sample_size, latent_diversity, mean_of, prompt_table, ratio_metrics


def test_effective_sample_size():
    assert float(effective_sample_size(torch.ones(7))) == pytest.approx(7)
    assert float(effective_sample_size(torch.tensor([1.0, 0.0, 0.0]))) == pytest.approx(1)


def test_ratio_metrics_are_the_extremes_and_the_effective_share():
    ratios = np.array([0.5, 1.0, 1.0, 2.5])
    found = ratio_metrics([torch.tensor(ratios[:3]).log(), torch.tensor(ratios[3:]).log()])
    assert float(found["ratio_min"]) == pytest.approx(0.5)
    assert float(found["ratio_max"]) == pytest.approx(2.5)
    assert float(found["ratio_ess"]) == pytest.approx(ratios.sum() ** 2 / (4 * (ratios**2).sum()))


def test_ratio_ess_is_one_for_equal_ratios_and_survives_overflow():
    assert float(ratio_metrics([torch.full((5,), 0.3)])["ratio_ess"]) == pytest.approx(1)
    assert float(ratio_metrics([torch.tensor([200.0, 0.0, 0.0, 0.0])])["ratio_ess"]) == pytest.approx(0.25)


def test_extremes_are_kept_over_updates_and_the_rest_is_averaged():
    updates = [
        {"loss": torch.tensor(x), "ratio_min": torch.tensor(x), "ratio_max": torch.tensor(x)} for x in (1.0, 4.0)
    ]
    assert {name: float(value) for name, value in mean_of(updates).items()} == {
        "loss": 2.5,
        "ratio_min": 1.0,
        "ratio_max": 4.0,
    }


def test_identical_samples_of_a_prompt_have_no_diversity():
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert float(latent_diversity(latents[[0, 0, 1, 1, 2]], np.array([0, 0, 1, 1, 2]))) == 0.0


def test_latent_diversity_is_the_mean_over_pairs_then_over_prompts():
    latents = torch.tensor([[0.0, 0.0], [3.0, 4.0], [10.0, 10.0], [10.0, 10.0], [10.0, 13.0], [99.0, 99.0]])
    diversity = latent_diversity(latents[:, :, None, None].half(), np.array([4, 4, 1, 1, 1, 0]))
    assert float(diversity) == pytest.approx((5 + (0 + 3 + 3) / 3) / 2 / math.sqrt(2))
    independent = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    assert float(latent_diversity(independent, np.zeros(64))) == pytest.approx(math.sqrt(2), rel=0.01)


def test_diversity_needs_two_samples_of_a_prompt():
    assert latent_diversity(torch.zeros(3, 2), np.arange(3)) is None


def test_prompt_table_has_count_mean_and_std_of_each_prompt():
    rewards = np.array([1.0, 2.0, 4.0, 7.0])
    table = prompt_table(rewards, np.array([2, 0, 2, 2]), ["a <fox> | a cat", "unseen", "a_dog"])
    assert table.splitlines() == [
        "| prompt | samples | mean reward | std |",
        "|:--|--:|--:|--:|",
        f"| a\\_dog | 3 | 4 | {np.std([1, 4, 7]):.3g} |",
        "| a &lt;fox&gt; \\| a cat | 1 | 2 | – |",
    ]


def test_prompt_table_shows_the_best_and_worst_of_many_and_says_how_many_are_between():
    lines = prompt_table(np.arange(100.0), np.arange(100), [str(index) for index in range(100)]).splitlines()[2:]
    assert len(lines) == 65
    assert lines[0].startswith("| 99 |")
    assert lines[31].startswith("| 68 |")
    assert lines[32] == "| *36 prompts between* | 36 | 49.5 | 10.4 |"
    assert lines[33].startswith("| 31 |")
    assert lines[64].startswith("| 0 |")
