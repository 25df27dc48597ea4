import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import KVWriter, Logger, configure

import diffusion_gym  # noqa: F401
from agents import DDPOIS, RLOO, RWR, Checkpoints, DenoisingPolicy, HeldOutEvaluation, Log, Rollouts, TimePredictor
from agents.evaluation.curves import read_curves
from agents.evaluation.measures import Samples
from agents.runs.manifest import MANIFEST_FILE, write_manifest
from agents.updates.distributed import Processes
from diffusion_gym.rewards import CallableReward
from diffusion_gym.rewards.normalised import Normalised
from diffusion_gym.samplers import DDIM

PER_ITERATION = 8 * 3


class Recorder(KVWriter):
    def __init__(self):
        self.entries = []

    def write(self, key_values, key_excluded, step=0):
        self.entries.append({"step": step, **key_values})


def make_env(model, *, reward=lambda east: east, prompts=None):
    return gym.make_vec(
        "DenoisingMDP-v0",
        num_envs=8,
        num_steps=3,
        model=model,
        reward=reward(CallableReward(lambda images, *_: model.positions(images)[:, 0], "east")),
        prompts=prompts,
        autoreset_mode="DISABLED",
    )


def make(model, algorithm=DDPOIS, *, learning_rate=1e-3, eta=1.0, x_axis="timesteps", **environment):
    learner = algorithm(
        DenoisingPolicy(model, sampler=DDIM(eta), seed=0),
        make_env(model, **environment),
        rollouts=Rollouts(samples=8),
        batch_size=8,
        learning_rate=learning_rate,
        log=Log(x_axis=x_axis),
        seed=5,
    )
    recorder = Recorder()
    learner.set_logger(Logger(None, [recorder]))
    return learner, recorder


def held_out(model):
    return CallableReward(lambda images, *_: -model.positions(images)[:, 0], "west")


@pytest.mark.parametrize(("x_axis", "per_iteration"), [("timesteps", PER_ITERATION), ("reward_queries", 8)])
def test_evaluations_are_logged_against_the_pretrained_model(mixture, x_axis, per_iteration):
    learner, recorder = make(mixture, x_axis=x_axis)
    learner.learn(4 * PER_ITERATION, HeldOutEvaluation(held_out(mixture), every=2, stop=False))
    logged = [entry for entry in recorder.entries if "evaluation/reward_gain" in entry]
    assert len(recorder.entries) == 4 + 2
    assert [entry["step"] for entry in logged] == [2 * per_iteration, 4 * per_iteration]  # the final weights too
    assert [entry["time/reward_queries"] for entry in logged] == [16, 32]
    for entry in logged:
        assert entry["evaluation/reward_gain"] == pytest.approx(-entry["evaluation/held_out_gain"], abs=1e-6)
        assert entry["evaluation/kl"] > 0
        assert 0 < entry["evaluation/feature_distance"] < 2
        assert "evaluation/diversity" in entry


def test_only_some_of_many_prompts_are_asked_and_their_queries_counted(mixture, monkeypatch):
    asked = []
    reward = CallableReward(lambda images, prompts, _: asked.extend(prompts) or mixture.positions(images)[:, 0], "east")
    texts = tuple(f"{one} and {other}" for one in mixture.names for other in mixture.names if one != other)
    assert len(texts) == 56
    how = {"model": mixture, "reward": reward, "prompts": texts, "autoreset_mode": "DISABLED"}
    env = gym.make_vec("DenoisingMDP-v0", num_envs=8, num_steps=3, **how)
    learner = DDPOIS(DenoisingPolicy(mixture, seed=0), env, rollouts=Rollouts(samples=8), batch_size=8, seed=0)
    recorder = Recorder()
    learner.set_logger(Logger(None, [recorder]))
    callback = HeldOutEvaluation(held_out(mixture), every=1, samples_per_prompt=1, stop=False)
    learner.learn(PER_ITERATION, callback)
    assert len(asked) == 48 + 8 + 48  # the pretrained model, a rollout, the trained policy
    assert asked[:48] == asked[-48:]
    assert len(set(asked[:48])) == 48
    assert (learner.reward_queries, learner.evaluation_queries) == (8, 96)
    assert recorder.entries[-1]["time/evaluation_queries"] == 96
    asked.clear()
    learner.learn(0, HeldOutEvaluation(held_out(mixture), max_prompts=None, samples_per_prompt=1, stop=False))
    assert set(asked) == set(texts)
    asked.clear()
    learner.learn(0, HeldOutEvaluation(held_out(mixture), prompts=texts[:50], samples_per_prompt=1, stop=False))
    assert asked[:50] == list(texts[:50])  # filled up to whole batches of lanes
    with pytest.raises(ValueError, match="max_prompts must be None or at least 2"):
        HeldOutEvaluation("brightness", max_prompts=1)


@pytest.mark.parametrize("output", ["csv", "tensorboard"])
def test_the_page_finds_evaluations_where_they_were_made(mixture, tmp_path, output):
    learner, _ = make(mixture)
    learner.set_logger(configure(str(tmp_path), [output]))
    learner.learn(4 * PER_ITERATION, HeldOutEvaluation(held_out(mixture), every=2, stop=False))
    learner.logger.close()
    curves = read_curves(tmp_path)
    np.testing.assert_array_equal(curves["evaluation/held_out_gain"][0], [16, 32])
    np.testing.assert_array_equal(curves["rollout/ep_rew_mean"][0], [8, 16, 24, 32])


def test_only_the_main_process_logs(mixture, monkeypatch):
    learner, recorder = make(mixture)
    monkeypatch.setattr(Processes, "is_main", False)
    learner.learn(PER_ITERATION, HeldOutEvaluation(held_out(mixture), every=1, stop=False))
    assert recorder.entries == []


def test_a_policy_that_draws_nothing_has_no_kl(mixture):
    learner, recorder = make(mixture, RWR, eta=0.0)
    learner.learn(PER_ITERATION, HeldOutEvaluation(held_out(mixture), every=1, stop=False))
    assert "evaluation/feature_distance" in recorder.entries[-1]
    assert "evaluation/kl" not in recorder.entries[-1]


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
    callback._pretrained = samples(0.0, 0.0)
    callback._begin()
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


def pressed_hard(mixture, **arguments):
    return HeldOutEvaluation(held_out(mixture), every=1, **{"samples_per_prompt": 8, "patience": 2, **arguments})


def test_a_real_training_is_stopped(mixture):
    """Pressed hard to the east, west pays."""
    learner, recorder = make(mixture, learning_rate=2e-2)
    callback = pressed_hard(mixture)
    learner.learn(60 * PER_ITERATION, callback)
    assert callback.over_optimised == 2
    assert learner.iteration < 60
    assert recorder.entries[-1]["evaluation/over_optimised"] == 2
    stopped_at = learner.iteration
    learner.learn(PER_ITERATION, callback)  # a fresh start
    assert learner.iteration == stopped_at + 1


@pytest.mark.parametrize("saves_first", [True, False])
def test_a_killed_and_resumed_run_is_judged_like_a_whole_one(mixture, tmp_path, saves_first):
    whole, _ = make(mixture, learning_rate=2e-2)
    expected = pressed_hard(mixture)
    whole.learn(60 * PER_ITERATION, expected)
    stopped_at = whole.iteration

    def start(iterations):
        """Begin the training or go on with it, until it ends or is killed."""
        saving, callback = Checkpoints(tmp_path), pressed_hard(mixture)
        found = saving.found()
        learner = DDPOIS.load(tmp_path, make_env(mixture)) if found else make(mixture, learning_rate=2e-2)[0]
        left = iterations * PER_ITERATION - learner.num_timesteps
        callbacks = [saving, callback] if saves_first else [callback, saving]
        return learner.learn(left, callbacks, reset_num_timesteps=False), callback

    for iterations in (stopped_at - 1, 60, 60):  # killed after the first of two; to its end; what has ended stays ended
        learner, callback = start(iterations)
    assert learner.iteration == stopped_at
    assert (callback.over_optimised, callback.best_iteration) == (2, expected.best_iteration)
    assert learner.evaluation_queries == whole.evaluation_queries
    np.testing.assert_array_equal(callback._best, expected._best)
    for ours, theirs in zip(learner.policy.parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_cannot_be_compared_is_judged_anew(mixture):
    _, callback = judged(mixture, (1, 1, 0.1), (2, 0, 0.1), (3, 0, 0.1))

    def known():
        callback._begin()
        return callback.over_optimised, callback.best_iteration

    assert known() == (2, 1)
    callback._pretrained = samples(0.0, 0.0, num_prompts=11)
    assert known() == (0, 0)
    callback._pretrained = samples(0.0, 0.0)
    assert known() == (2, 1)
    callback.prompts = mixture.names[:2]
    assert known() == (0, 0)


def test_a_checkpoint_of_before_callbacks_had_states_loads(mixture, tmp_path):
    learner, _ = make(mixture)
    learner.save(tmp_path / "old")
    file = tmp_path / "old" / "training_state.json"
    state = json.loads(file.read_text())
    del state["callbacks"]
    file.write_text(json.dumps(state))
    (tmp_path / "old" / MANIFEST_FILE).unlink()
    write_manifest(tmp_path / "old")
    assert DDPOIS.load(tmp_path / "old", make_env(mixture)).callback_states == {}


def test_a_policy_that_forgot_what_it_was_is_refused(mixture, tmp_path):
    """Only a denoiser's pretrained weights are the model's own; another policy's are gone after `load`."""
    env = gym.make_vec(
        "TimePredictionMDP-v0", num_envs=4, model=mixture, reward="brightness", max_steps=3, autoreset_mode="DISABLED"
    )
    policy = TimePredictor(env.single_observation_space, initial_ratio=0.5, seed=0)
    learner = RLOO(policy, env, rollouts=Rollouts(group_size=2), learning_rate=1e-2, seed=0)
    callback = HeldOutEvaluation(held_out(mixture), every=1, stop=False)
    learner.learn(1, [callback, Checkpoints(tmp_path)])
    with pytest.raises(ValueError, match="after 1 iterations a TimePredictor no longer knows what it was"):
        RLOO.load(tmp_path, env).learn(1, callback, reset_num_timesteps=False)


def test_a_reward_that_evaluations_would_change_is_refused(mixture):
    learner, _ = make(mixture, reward=Normalised)
    with pytest.raises(ValueError, match="'normalised_east' learns from what it judges"):
        learner.learn(PER_ITERATION, HeldOutEvaluation(held_out(mixture)))
    learner, _ = make(mixture)
    with pytest.raises(ValueError, match="'normalised_west' learns from what it judges"):
        learner.learn(PER_ITERATION, HeldOutEvaluation(Normalised(held_out(mixture))))
    learner, _ = make(mixture, reward=lambda east: Normalised(east, mean=0.0, std=2.0))
    learner.learn(PER_ITERATION, HeldOutEvaluation(held_out(mixture), stop=False))
    assert learner.iteration == 1


def test_an_environment_with_one_prompt_is_refused(mixture):
    learner, _ = make(mixture, prompts=["anything"])
    with pytest.raises(ValueError, match=r"at least two prompts, got \['anything'\]"):
        learner.learn(PER_ITERATION, HeldOutEvaluation(held_out(mixture)))
    learner.learn(PER_ITERATION, HeldOutEvaluation(held_out(mixture), prompts=mixture.names[:2]))
    assert learner.iteration == 1


@pytest.mark.parametrize("wrong", [{"every": 0}, {"patience": 0}, {"significance": 0.5}, {"samples_per_prompt": 0}])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match="must be at least 1 and significance in"):
        HeldOutEvaluation("brightness", **wrong)
    with pytest.raises(ValueError, match="at least two prompts"):
        HeldOutEvaluation("brightness", prompts=["a cat"])
