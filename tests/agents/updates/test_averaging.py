import gymnasium as gym
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

import diffusion_gym  # noqa: F401
from agents import DDPOIS, AdamW, DenoisingPolicy, Full, LoRA, Rollouts

FULL = Full()
DECAY, UPDATES = 0.4, 12  # the decay is reached after 6 updates


@pytest.fixture
def make(mixture):
    def make(adaptation=FULL, **arguments):
        env = gym.make_vec("DenoisingMDP-v0", num_envs=4, model=mixture, num_steps=3, reward="brightness")
        policy = DenoisingPolicy(mixture, adaptation=adaptation, seed=0)
        settings = {"batch_size": 4, "learning_rate": 1e-2, "seed": 0, "optimizer": AdamW(ema_decay=DECAY)}
        return DDPOIS(policy, env, rollouts=Rollouts(samples=4), **{**settings, **arguments})

    return make


def trained(learner):
    return [p.detach().clone() for p in learner.policy.parameters() if p.requires_grad]


class Trace(BaseCallback):
    """Keep the weights after each update."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def _on_rollout_start(self):
        self.weights.append(trained(self.model))

    def _on_training_end(self):
        self.weights.append(trained(self.model))

    def _on_step(self):
        return True


@pytest.mark.parametrize("adaptation", [FULL, LoRA()], ids=["full", "lora"])
def test_the_average_is_the_one_computed_by_hand(make, adaptation):
    learner, trace = make(adaptation), Trace()
    with learner.averaged_weights():
        start = trained(learner)
    learner.learn(UPDATES * 12, trace, log_interval=0)
    assert all(torch.equal(a, b) for a, b in zip(start, trace.weights[0], strict=True))
    expected = [weight.double() for weight in trace.weights[1]]
    for k in range(2, UPDATES + 1):
        decay = min(DECAY, k / (k + 9))
        for average, weight in zip(expected, trace.weights[k], strict=True):
            average.mul_(decay).add_(weight, alpha=1 - decay)
    own = trained(learner)
    with learner.averaged_weights() as policy:
        assert policy is learner.policy
        for average, reference in zip(trained(learner), expected, strict=True):
            torch.testing.assert_close(average, reference.float(), rtol=1e-5, atol=1e-7)
        assert not all(torch.equal(a, b) for a, b in zip(trained(learner), own, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(trained(learner), own, strict=True))


def test_own_weights_come_back_after_an_error_too(make):
    learner = make().learn(24, log_interval=0)
    own = trained(learner)

    def fail():
        with learner.averaged_weights():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert all(torch.equal(a, b) for a, b in zip(trained(learner), own, strict=True))


def test_averaged_weights_are_saved_as_a_policy(make, mixture, tmp_path):
    learner = make().learn(24, log_interval=0)
    with learner.averaged_weights() as policy:
        policy.save(tmp_path)
        expected = trained(learner)
    saved = DenoisingPolicy.load(tmp_path, mixture)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), expected, strict=True))


def test_an_interrupted_run_goes_on_with_its_average(make, tmp_path):
    whole = make().learn(UPDATES * 12, log_interval=0)
    make().learn(5 * 12, log_interval=0).save(tmp_path)
    again = DDPOIS.load(tmp_path, whole.env).learn((UPDATES - 5) * 12, log_interval=0, reset_num_timesteps=False)
    with whole.averaged_weights(), again.averaged_weights():
        assert all(torch.equal(a, b) for a, b in zip(trained(whole), trained(again), strict=True))


def test_misuse_is_named(make, tmp_path):
    learner = make()
    with learner.averaged_weights(), pytest.raises(RuntimeError, match=r"policy\.save writes these weights"):
        learner.save(tmp_path / "run")
    with learner.averaged_weights(), pytest.raises(RuntimeError, match="train outside"):
        learner.learn(12, log_interval=0)
    with (
        pytest.raises(RuntimeError, match=r"no averaged weights: give the algorithm optimizer=AdamW\(ema_decay="),
        make(optimizer=AdamW()).averaged_weights(),
    ):
        pass
    with pytest.raises(ValueError, match=r"ema_decay must be a finite number in \(0, 1\), got 1"):
        AdamW(ema_decay=1)
