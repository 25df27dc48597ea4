"""The training loop that all stages share."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tools.emoji.training import TrainingRun

ROOT = Path(__file__).parents[2]


def make(folder, images=640, **keywords):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    settings = {"batch_size": 16, "learning_rate": 0.05, "warm_up": 4, "ema_decay": 0.9} | keywords
    return TrainingRun(network, folder, images=images, **settings)


def loss(run):
    x = torch.randn(run.batch_size, 3, generator=run.generator(0))
    value = (run.network(x) - x.sum(-1, keepdim=True)).square().mean()
    return value, {"loss": value}


def fit(run, **keywords):
    saved = []
    run.fit(loss, save=lambda r: saved.append((r.images_seen, r.network[0].weight.clone())), **keywords)
    return saved


class StoppedError(Exception):
    pass


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path):
    whole = make(tmp_path / "whole")
    fit(whole, save_every=160)

    def fails(run):
        if run.step == 25:
            raise StoppedError
        return loss(run)

    with pytest.raises(StoppedError):
        make(tmp_path / "cut").fit(fails, save=lambda run: None, save_every=160)
    resumed = make(tmp_path / "cut")
    fit(resumed, save_every=160)
    assert resumed.step == whole.step == 40
    for ours, theirs in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(resumed.ema.shadow_params, whole.ema.shadow_params, strict=True):
        assert torch.equal(ours, theirs)


def test_it_saves_the_averaged_weights_and_trains_on_with_the_others(tmp_path):
    run = make(tmp_path)
    saved = fit(run, save_every=160)
    assert [images for images, _ in saved] == [160, 320, 480, 640]
    assert torch.equal(saved[-1][1], run.ema.shadow_params[0])
    assert not torch.equal(saved[-1][1], run.network[0].weight)
    assert run.network.training


def test_the_loss_falls_and_is_logged_by_images_seen(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make(tmp_path, images=3200)
    fit(run, save_every=10_000, log_every=30)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == [480, 960, 1440, 1920, 2400, 2880, 3200]
    assert scalars[-1].value < 0.1 * scalars[0].value
    assert {"loss", "images_per_second"} <= set(events.Tags()["scalars"])


def test_the_learning_rate_warms_up_and_falls_along_half_a_cosine(tmp_path):
    run = make(tmp_path, images=16 * 100)
    rates = []
    for step in range(101):
        run.step = step
        rates.append(run.learning_rate())
    assert rates[0] == pytest.approx(0.05 / 4)
    assert max(rates) == pytest.approx(0.05, rel=0.01)
    assert rates[50] == pytest.approx(0.05 * (0.51 + 0.49 * math.cos(math.pi / 2)))
    assert rates[100] == pytest.approx(0.02 * 0.05)


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path):
    run = make(tmp_path)
    with pytest.raises(FloatingPointError, match="the gradient of step 0 is nan; start again from"):
        run.update(run.network(torch.full((1, 3), torch.nan)).mean())
    assert all(torch.isfinite(parameter).all() for parameter in run.network.parameters())


def test_another_batch_size_is_refused(tmp_path):
    fit(make(tmp_path, images=32), save_every=32)
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text()) == {"step": 2, "batch_size": 16}
    with pytest.raises(ValueError, match="has batch size 16, got 8: use another folder"):
        fit(make(tmp_path, batch_size=8), save_every=32)


def test_two_processes_average_the_gradients_of_their_shares(tmp_path):
    """Against one process that takes both shares itself."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "from tests.tools.test_training import fit, make, share_loss\n"
        "from tools.emoji.training import join_processes\n"
        "join_processes()\n"
        "make(Path(sys.argv[1]), images=80).fit(share_loss, save=lambda run: None, save_every=80)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script, tmp_path / "two"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    one = make(tmp_path / "one", images=80)
    while one.step < one.num_steps:
        generators = [torch.Generator().manual_seed(rank * 1_000_003 + one.step) for rank in range(2)]
        one.update(sum(squared_error(one.network, generator, 8) for generator in generators) / 2)
    two = make(tmp_path / "two", images=80)
    two.resume()
    assert two.step == one.step == 5
    for ours, theirs in zip(two.network.parameters(), one.network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def squared_error(network, generator, size):
    x = torch.randn(size, 3, generator=generator)
    return (network(x) - x.sum(-1, keepdim=True)).square().mean()


def share_loss(run):
    value = squared_error(run.network, run.generator(0), run.share)
    return value, {"loss": value}
