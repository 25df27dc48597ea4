import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.logger import KVWriter, Logger

import diffusion_gym  # noqa: F401
from agents import DDPOIS, DenoisingPolicy, HeldOutEvaluation
from agents.evaluation.measures import Samples
from diffusion_gym.models import load_model
from diffusion_gym.rewards import CallableReward
from diffusion_gym.rewards.normalised import Normalised

PER_ITERATION = 8 * 3


class Recorder(KVWriter):
    def __init__(self):
        self.entries = []

    def write(self, key_values, key_excluded, step=0):
        self.entries.append(dict(key_values))


@pytest.fixture(scope="module")
def mixture():
    return load_model("mixture")


def make(model, *, learning_rate=1e-3, reward=lambda east: east):
    env = gym.make_vec(
        "DenoisingMDP-v0",
        num_envs=8,
        num_steps=3,
        model=model,
        reward=reward(CallableReward(lambda images, *_: model.positions(images)[:, 0], "east")),
        autoreset_mode="DISABLED",
    )
    learner = DDPOIS(
        DenoisingPolicy(model, seed=0), env, samples_per_epoch=8, batch_size=8, learning_rate=learning_rate, seed=5
    )
    recorder = Recorder()
    learner.set_logger(Logger(None, [recorder]))
    return learner, recorder


def held_out(model):
    return CallableReward(lambda images, *_: -model.positions(images)[:, 0], "west")


def test_evaluations_are_logged_against_the_pretrained_model(mixture):
    learner, recorder = make(mixture)
    callback = HeldOutEvaluation(held_out(mixture), every=2, stop=False)
    learner.learn(5 * PER_ITERATION, callback)
    logged = [entry for entry in recorder.entries if "evaluation/kl" in entry]
    assert len(recorder.entries) == 5
    assert len(logged) == 2  # before the third and the fifth rollout; the one after the last is in no rollout's entry
    for entry in logged:
        assert entry["evaluation/reward_gain"] == pytest.approx(-entry["evaluation/held_out_gain"], abs=1e-6)
        assert entry["evaluation/kl"] > 0
        assert 0 < entry["evaluation/feature_distance"] < 2
        assert "evaluation/diversity" in entry


def test_training_goes_the_same_way_with_and_without_evaluations(mixture):
    """An evaluation takes no random number from the training."""
    weights = []
    for callback in (None, HeldOutEvaluation(held_out(mixture), every=1, stop=False)):
        learner, _ = make(mixture)
        learner.learn(3 * PER_ITERATION, callback)
        weights.append([parameter.detach().clone() for parameter in learner.policy.denoiser.parameters()])
    assert all((a == b).all() for a, b in zip(*weights, strict=True))


def samples(reward, other, num_prompts=12):
    noise = np.random.default_rng(0).normal(0, 0.1, (num_prompts, 2))
    return Samples(
        prompts=tuple(map(str, range(num_prompts))),
        rewards=reward + noise,
        held_out=other + noise[::-1],
        features=np.ones((num_prompts, 2, 1)),
        kl=np.ones(num_prompts),
        images=np.zeros((num_prompts, 2, 1, 1, 3), dtype=np.uint8),
    )


def judged(mixture, *evaluations, **arguments):
    """Return at which evaluation a training would end, and the callback."""
    learner, _ = make(mixture)
    callback = HeldOutEvaluation(held_out(mixture), **arguments)
    callback.init_callback(learner)
    callback._pretrained = callback._best = samples(0.0, 0.0)
    for number, (reward, other, spread) in enumerate(evaluations, start=1):
        learner.iteration = number
        now = samples(reward, other)
        rng = np.random.default_rng(number)
        now.rewards[:] += rng.normal(0, spread, now.rewards.shape)
        now.held_out[:] += rng.normal(0, spread, now.held_out.shape)
        callback._judge(now)
        if not callback._on_step():
            return number, callback
    return None, callback


@pytest.mark.parametrize(
    ("evaluations", "ends_at"),
    [
        ([(1, -1, 0.1), (2, -2, 0.1), (3, -3, 0.1)], 2),  # the reward rises, the held-out one falls
        ([(1, 1, 0.1), (2, 2, 0.1), (3, 3, 0.1)], None),  # both rise
        ([(-1, -1, 0.1), (-2, -2, 0.1), (-3, -3, 0.1)], None),  # both fall: a failure, and no over-optimisation
        ([(1, -1, 0.1), (2, 1, 0.1), (3, 0.9, 0.01), (4, 0, 0.1), (5, 0, 0.1)], 4),  # against the best, not the first
        ([(0.1, -0.1, 3.0), (0.1, -0.1, 3.0), (0.1, -0.1, 3.0)], None),  # by chance
    ],
)
def test_training_ends_when_the_held_out_reward_pays_for_the_gain(mixture, evaluations, ends_at):
    assert judged(mixture, *evaluations)[0] == ends_at


def test_patience_and_the_choice_to_stop(mixture):
    falls = [(k, -k, 0.1) for k in range(1, 5)]
    assert judged(mixture, *falls, patience=1)[0] == 1
    assert judged(mixture, *falls, patience=4)[0] == 4
    ends_at, callback = judged(mixture, *falls, stop=False)
    assert ends_at is None
    assert callback.over_optimised == 4
    assert judged(mixture, (1, 1, 0.1), (2, 0, 0.1), (3, 0, 0.1))[1].best_iteration == 1


def test_a_real_training_is_stopped(mixture):
    """Pressed hard to the east, west pays."""
    learner, _ = make(mixture, learning_rate=2e-2)
    callback = HeldOutEvaluation(held_out(mixture), every=1, samples_per_prompt=8, patience=2)
    learner.learn(60 * PER_ITERATION, callback)
    assert callback.over_optimised == 2
    assert learner.iteration < 60


def test_a_reward_that_evaluations_would_change_is_refused(mixture):
    learner, _ = make(mixture, reward=Normalised)
    with pytest.raises(ValueError, match="'normalised_east' learns from what it judges"):
        learner.learn(PER_ITERATION, HeldOutEvaluation(held_out(mixture)))
    learner, _ = make(mixture, reward=lambda east: Normalised(east, mean=0.0, std=2.0))
    learner.learn(PER_ITERATION, HeldOutEvaluation(held_out(mixture), stop=False))
    assert learner.iteration == 1


@pytest.mark.parametrize("wrong", [{"every": 0}, {"patience": 0}, {"significance": 0.5}, {"samples_per_prompt": 0}])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match="must be at least 1 and significance in"):
        HeldOutEvaluation("brightness", **wrong)
    with pytest.raises(ValueError, match="at least two prompts"):
        HeldOutEvaluation("brightness", prompts=["a cat"])
