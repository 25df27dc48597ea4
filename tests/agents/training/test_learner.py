"""What learners from data share: logs, callbacks, progress, saved runs."""

import pytest
import torch
from stable_baselines3.common.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import AdamW, Checkpoints, Full
from agents.callbacks import SampleGrid
from agents.consistency import ConsistencyTraining, Latents, improved
from agents.training.learner import Cosine
from diffusion_gym.models import load_model
from diffusion_gym.models.consistency_mixture import write_consistency_mixture


@pytest.fixture(scope="module")
def student(mixture, tmp_path_factory):
    return load_model(write_consistency_mixture(tmp_path_factory.mktemp("plane") / "student", mixture, width=16))


@pytest.fixture(scope="module")
def data(mixture):
    drawn = mixture.draw(mixture.encode_prompts(["anything"] * 64), torch.Generator().manual_seed(0))
    return Latents(drawn, ["anything"] * 64)


def learner(student, data, **settings):
    fixed = {"batch_size": 8, "seed": 0, "precision": None, **improved(last=20)}
    return ConsistencyTraining(student, data=data, **{**fixed, **settings})


def weights(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.trained_of(run.network)])


def test_the_log_has_scalars_hyperparameters_and_sample_grids(student, data, tmp_path):
    run = learner(student, data, tensorboard_log=str(tmp_path))
    run.learn(8 * 6, SampleGrid(["north", "east"], every=3, num_steps=(1, 2)), log_interval=2)
    events = EventAccumulator(str(tmp_path / "ConsistencyTraining_1"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [16, 32, 48]
    assert {"train/grad_norm", "train/learning_rate", "time/fps"} <= set(events.Tags()["scalars"])
    for grid in ("images/1_steps", "images/2_steps"):
        assert [image.step for image in events.Images(grid)][-1] == 48
    hyperparameters = (tmp_path / "ConsistencyTraining_1").glob("events*")
    assert any(b"discretisation" in file.read_bytes() for file in hyperparameters)


def test_the_model_s_own_weights_are_never_changed(student, data):
    before = {name: value.clone() for name, value in student.denoiser.state_dict().items()}
    learner(student, data).learn(16)
    assert all(torch.equal(value, before[name]) for name, value in student.denoiser.state_dict().items())


def test_a_run_is_a_function_of_its_seed(student, data):
    first, same, other = (learner(student, data, seed=seed).learn(24) for seed in (1, 1, 2))
    assert torch.equal(weights(first), weights(same))
    assert not torch.equal(weights(first), weights(other))


def test_callbacks_count_and_can_end_it(student, data):
    run = learner(student, data)
    seen = []
    run.learn(8 * 10, lambda local, _: seen.append(run.num_timesteps) or run.num_timesteps < 24)
    assert seen == [8, 16, 24]
    assert (run.num_timesteps, run.iteration, run.num_updates) == (24, 3, 3)


def test_progress_bars_and_loggers_are_sb3_s(student, data):
    run = learner(student, data)
    logger = Logger(None, [])
    run.set_logger(logger)
    run.learn(16, progress_bar=True)
    assert run.logger is logger


def test_a_learning_rate_falls_and_is_saved(student, data, tmp_path):
    run = learner(student, data, learning_rate=Cosine(1e-3, 0.1)).learn(8 * 4)
    rates = [Cosine(1e-3, 0.1)(1 - step / 4) for step in range(4)]
    assert run.updates.optimizer.param_groups[0]["lr"] == pytest.approx(rates[-1])
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(1e-3)
    run.save(tmp_path / "run")
    again = ConsistencyTraining.load(tmp_path / "run", student, data=data)
    assert again.learning_rate == Cosine(1e-3, 0.1)
    assert repr(again.discretisation) == repr(run.discretisation)
    assert torch.equal(weights(again), weights(run))


def test_a_function_as_learning_rate_is_to_be_given_again(student, data, tmp_path):
    run = learner(student, data, learning_rate=lambda remaining: 1e-3 * remaining).learn(8)
    run.save(tmp_path / "run")
    with pytest.raises(ValueError, match="give it again"):
        ConsistencyTraining.load(tmp_path / "run", student, data=data)
    assert ConsistencyTraining.load(tmp_path / "run", student, data=data, learning_rate=1e-4).learning_rate == 1e-4


def test_samples_are_those_of_the_average(student, data):
    run = learner(student, data, learning_rate=0.1, optimizer=AdamW(ema_decay=0.99)).learn(8 * 5)
    own = weights(run)
    images = run.draw(["north"], num_steps=1, seeds=[0])
    assert torch.equal(weights(run), own)
    with run.averaged_weights():
        assert not torch.equal(weights(run), own)
        assert torch.equal(run.draw(["north"], num_steps=1, seeds=[0]), images)
        with pytest.raises(RuntimeError, match="averaged"):
            run.save("nowhere")


def test_an_update_that_fails_leaves_the_run_as_it_was(student, data):
    run = learner(student, data, learning_rate=1e-2).learn(8)
    before = weights(run)
    run.metric = type("Broken", (type(run.metric),), {"__call__": lambda *_: torch.tensor([float("nan")] * 8)})()
    with pytest.raises((FloatingPointError, RuntimeError)):
        run.learn(8, reset_num_timesteps=False)
    assert torch.equal(weights(run), before)
    assert run.num_timesteps == 8


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"adaptation": "full"}, TypeError, "adaptation must be"),
        ({"precision": "fp16"}, ValueError, "precision must be"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be"),
    ],
)
def test_bad_arguments_are_refused(student, data, settings, error, message):
    with pytest.raises(error, match=message):
        learner(student, data, **settings)


def test_a_run_of_another_kind_is_refused(student, data, tmp_path):
    from agents.consistency import TrajectoryRegression

    learner(student, data, adaptation=Full()).learn(8, Checkpoints(tmp_path / "run"))
    with pytest.raises(ValueError, match="is a run of ConsistencyTraining"):
        TrajectoryRegression.load(tmp_path / "run", student, data=data)
