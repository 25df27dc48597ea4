from dataclasses import replace

import gymnasium as gym
import pytest
import torch
from stable_baselines3.common.logger import configure

import diffusion_gym  # noqa: F401
from agents import DDPOIS, DDPOSF, RLOO, RWR, AdamW, DenoisingPolicy, DiffusionNFT, Replay, collect

KINDS = [DDPOIS, DDPOSF, RLOO, RWR, DiffusionNFT]


@pytest.fixture
def make(mixture):
    def make(algorithm=DDPOIS, precision=None, **arguments):
        settings = {"num_steps": 3, "reward": "brightness", "autoreset_mode": "DISABLED"}
        env = gym.make_vec("DenoisingMDP-v0", num_envs=8, model=mixture, **settings)
        policy = DenoisingPolicy(mixture, precision=precision, seed=0)
        rollouts = replace(algorithm.rollouts, samples=8)
        arguments = {"batch_size": 8, "learning_rate": 1e-3, "seed": 0, "rollouts": rollouts, **arguments}
        return algorithm(policy, env, **arguments)

    return make


def weights(learner):
    return [parameter.detach().clone() for parameter in learner.policy.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def spoil(learner, value, iterations=range(100)):
    """Let the gradient be `value` somewhere in some iterations."""

    def hook(gradient):
        if learner.iteration in iterations:
            gradient = gradient.clone()
            gradient[0] = value
        return gradient

    learner.policy.denoiser.last.bias.register_hook(hook)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("algorithm", KINDS)
def test_a_gradient_that_is_not_finite_raises_before_the_weights_are_touched(make, algorithm, value):
    learner = make(algorithm)
    learner.learn(24, log_interval=0)
    before, updates = weights(learner), learner.num_updates
    spoil(learner, value)
    message = rf"the gradient of an update was NaN or infinite \(iteration 1, after {updates} updates\).*Try a lower"
    with pytest.raises(FloatingPointError, match=message):
        learner.learn(24, log_interval=0, reset_num_timesteps=False)
    assert same(weights(learner), before)
    assert learner.num_updates == updates


def test_a_loss_that_is_not_finite_is_named(make, mixture):
    learner = make(RWR)
    replay = Replay.from_rollout(collect(learner.env, learner.policy, seeds=[0]))
    replay.latents[3] = torch.inf
    with pytest.raises(FloatingPointError, match="the loss of an update was NaN or infinite"):
        learner.fit(replay)
    assert same(weights(learner), weights(make(RWR)))


def test_such_updates_are_skipped_counted_and_the_count_is_saved(make, tmp_path):
    learner = make(optimizer=AdamW(on_nonfinite="skip"))
    learner.set_logger(configure(str(tmp_path), ["csv"]))
    spoil(learner, float("nan"), iterations=[1, 2])
    with pytest.warns(UserWarning, match="the gradient of an update was NaN or infinite"):
        learner.learn(4 * 24)
    learner.logger.close()
    assert (learner.num_updates, learner.updates.guard.num_skipped, learner.iteration) == (2, 2, 4)
    assert all(torch.isfinite(parameter).all() for parameter in weights(learner))
    header, *rows = (line.split(",") for line in (tmp_path / "progress.csv").read_text().splitlines())
    assert [row[header.index("train/skipped_updates")] for row in rows] == ["0.0", "1.0", "2.0", "2.0"]
    learner.save(tmp_path / "run")
    again = DDPOIS.load(tmp_path / "run", learner.env)
    assert (again.updates.guard.num_skipped, again.updates.guard.on_nonfinite) == (2, "skip")


def test_a_skipped_update_leaves_the_optimizer_as_it_was(make):
    learner = make(optimizer=AdamW(on_nonfinite="skip", ema_decay=0.5))
    learner.learn(24, log_interval=0)
    before = [value.clone() for state in learner.updates.optimizer.state.values() for value in state.values()]
    with learner.averaged_weights():
        averages = weights(learner)
    spoil(learner, float("inf"))
    with pytest.warns(UserWarning, match="NaN or infinite"):
        learner.learn(24, log_interval=0, reset_num_timesteps=False)
    assert same([value for state in learner.updates.optimizer.state.values() for value in state.values()], before)
    with learner.averaged_weights():
        assert same(weights(learner), averages)


def test_an_unknown_answer_is_named():
    with pytest.raises(ValueError, match=r"on_nonfinite must be one of \('raise', 'skip'\), got 'ignore'"):
        AdamW(on_nonfinite="ignore")


def with_scale(learner, scale):
    if learner.updates.guard.scaler.is_enabled():
        learner.updates.guard.scaler.load_state_dict({**learner.updates.guard.scaler.state_dict(), "scale": scale})
    return learner


def test_only_fp16_scales_its_losses(make):
    enabled = {precision: make(precision=precision).updates.guard.scaler.is_enabled() for precision in (None, "bf16")}
    assert enabled == {None: False, "bf16": False}
    assert make(precision="fp16").updates.guard.scaler.get_scale() == 65536


@pytest.mark.parametrize("algorithm", KINDS)
def test_the_scale_is_out_of_the_gradient_before_it_is_clipped(make, algorithm):
    """What is logged as the norm and compared to max_grad_norm is that of the loss itself."""
    norms = []
    for precision in (None, "fp16"):
        learner = with_scale(make(algorithm, precision=precision), 1024.0)
        rollout = collect(make().env, make().policy, seeds=[0])
        norms.append(float(learner.train(rollout)["grad_norm"]))
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_gradients_that_vanish_in_fp16_do_not_with_the_scale(make):
    def vanished(scale):
        learner = with_scale(make(precision="fp16", optimizer=AdamW(max_grad_norm=None)), scale)
        bias, zeros = learner.policy.denoiser.second.bias, []
        with torch.no_grad():
            learner.policy.denoiser.last.weight.fill_(1e-7)
        learner.updates.optimizer.register_step_pre_hook(lambda *_: zeros.append(int((bias.grad == 0).sum())))
        learner.train(collect(learner.env, learner.policy, seeds=[0]))
        return zeros[0]

    assert vanished(1.0) > 0
    assert vanished(2.0**14) == 0


def test_an_overflow_is_skipped_and_the_scale_halved_without_an_error(make, tmp_path):
    learner = with_scale(make(precision="fp16"), 2.0**40)
    learner.set_logger(configure(str(tmp_path), ["csv"]))
    before = weights(learner)
    learner.learn(24)
    assert (learner.num_updates, learner.updates.guard.num_overflows, learner.updates.guard.num_skipped) == (0, 1, 0)
    assert learner.updates.guard.scaler.get_scale() == 2.0**39
    assert same(weights(learner), before)
    learner.learn(39 * 24, reset_num_timesteps=False)
    learner.logger.close()
    assert learner.num_updates > 0
    assert learner.num_updates + learner.updates.guard.num_overflows == 40
    header, *rows = (line.split(",") for line in (tmp_path / "progress.csv").read_text().splitlines())
    assert float(rows[-1][header.index("train/overflowed_updates")]) == learner.updates.guard.num_overflows
    learner.save(tmp_path / "run")
    again = DDPOIS.load(tmp_path / "run", learner.env)
    assert again.updates.guard.state_dict() == learner.updates.guard.state_dict()
    assert again.updates.guard.scaler.state_dict()["_growth_tracker"] > 0


def test_what_the_scale_does_not_explain_raises_in_fp16_too(make):
    learner = with_scale(make(precision="fp16"), 1.0)
    spoil(learner, float("nan"))
    learner.learn(24, log_interval=0)
    assert learner.updates.guard.num_overflows == 1
    with pytest.raises(FloatingPointError, match="the gradient of an update"):
        learner.learn(24, log_interval=0, reset_num_timesteps=False)
    regression = make(RWR, precision="fp16")
    replay = Replay.from_rollout(collect(regression.env, regression.policy, seeds=[0]))
    replay.latents[3] = torch.nan
    with pytest.raises(FloatingPointError, match="the loss of an update"):
        regression.fit(replay)
