"""What all algorithms share, in Stable-Baselines3's manners."""

import dataclasses
import inspect
import json
import pydoc
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback, LogEveryNTimesteps
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import diffusion_gym  # noqa: F401
from agents import (
    DDPOIS,
    DDPOSF,
    DPOK,
    GRPO,
    KL,
    RLOO,
    RWR,
    AdamW,
    ContextFreeSchedule,
    DenoisingPolicy,
    DiffusionNFT,
    Full,
    Groups,
    Log,
    LoRA,
    PerPrompt,
    PolicyGradient,
    Rollouts,
    Steps,
    Window,
)
from agents.losses import Surrogate, score_function_surrogate

ALGORITHMS = [DDPOSF, DDPOIS, GRPO, RLOO, DPOK, RWR, DiffusionNFT]
MAX_STEPS = 12
FULL = Full()


def make_env(model, num_envs=4, num_steps=3, **arguments):
    arguments = {"reward": "brightness", "autoreset_mode": "DISABLED", **arguments}
    return gym.make_vec("DenoisingMDP-v0", num_envs=num_envs, num_steps=num_steps, model=model, **arguments)


def make(algorithm, model, *, env=None, adaptation=FULL, **arguments):
    """Return a learner from two groups of two, in two updates."""
    sizes = {"rollouts": Rollouts(samples=4, group_size=2), "batch_size": 2, "learning_rate": 1e-2, "seed": 3}
    policy = DenoisingPolicy(model, adaptation=adaptation, seed=0)
    return algorithm(policy, make_env(model) if env is None else env, **{**sizes, **arguments})


def times_learner(model, samples=4, **arguments):
    env = gym.make_vec(
        "TimePredictionMDP-v0",
        num_envs=4,
        model=model,
        reward="brightness",
        max_steps=MAX_STEPS,
        autoreset_mode="DISABLED",
    )
    rollouts = Rollouts(samples=samples, group_size=2, same_noise=True, num_starts=5)
    policy = ContextFreeSchedule([0.4] * MAX_STEPS, seed=0)
    return RLOO(policy, env, **{"rollouts": rollouts, "learning_rate": 1e-2, "seed": 3, **arguments})


def weights(learner):
    return torch.cat([p.detach().flatten() for p in learner.policy.parameters() if p.requires_grad])


class Watch(BaseCallback):
    """Calls a function with the algorithm before each rollout."""

    def __init__(self, see):
        super().__init__()
        self.see = see

    def _on_rollout_start(self):
        self.see(self.model)

    def _on_step(self):
        return True


# Keywords


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_signature_shows_every_keyword(algorithm):
    """At most 18 of them, the policy and the environment by place, and no others; `help` shows the same."""
    parameters = inspect.signature(algorithm).parameters
    assert list(parameters) == [field.name for field in dataclasses.fields(algorithm) if field.init]
    assert len(parameters) <= 18
    assert list(parameters)[:2] == ["policy", "env"]
    kinds = [parameter.kind for parameter in parameters.values()]
    assert set(kinds[:2]) == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert set(kinds[2:]) == {inspect.Parameter.KEYWORD_ONLY}
    shown = pydoc.plain(pydoc.render_doc(algorithm)).partition("Method resolution order")[0]
    for name in parameters:
        assert f"{name}:" in shown


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_keywords_that_there_are_not_are_named(mixture, algorithm):
    wrong = {DDPOSF: "clip_range", RWR: "kl_coefficient", DiffusionNFT: "clip_range"}.get(algorithm, "lr")
    with pytest.raises(TypeError, match=rf"{algorithm.__name__}\.__init__\(\) got an unexpected keyword .* '{wrong}'"):
        make(algorithm, mixture, **{wrong: 1})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_objects_of_the_wrong_kind_are_named(mixture, algorithm):
    with pytest.raises(TypeError, match="policy must be a Policy"):
        algorithm("MlpPolicy", make_env(mixture))
    with pytest.raises(TypeError, match="env must be a torch vector environment"):
        algorithm(DenoisingPolicy(mixture), gym.make("DenoisingMDP-v0", model=mixture))
    for name, example, wrong in (("optimizer", "AdamW", "muon"), ("rollouts", "Rollouts", 256), ("log", "Log", None)):
        with pytest.raises(TypeError, match=rf"{name} must be a part, such as {example}\(…\); got {wrong!r}"):
            make(algorithm, mixture, **{name: wrong})


def test_what_a_policy_is_not_made_of_is_named(mixture):
    with pytest.raises(TypeError, match="model must be a DiffusionModel"):
        DenoisingPolicy(make_env(mixture))
    with pytest.raises(TypeError, match="sequence of texts"):
        DenoisingPolicy(mixture, prompts="simple_animals")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_epochs": 0}, "n_epochs must be an integer of at least 1, got 0"),
        ({"n_epochs": 1.5}, "n_epochs must be an integer of at least 1, got 1.5"),
        ({"verbose": -1}, "verbose must be an integer of at least 0, got -1"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"learning_rate": -1e-3}, r"learning_rate must be a finite number in \[0, inf\), got -0.001"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number .*, got nan"),
    ],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_numbers_that_are_none_are_named(mixture, algorithm, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(algorithm, mixture, **arguments)


@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP"])
def test_lanes_that_reset_themselves_are_refused_where_episodes_differ_in_length(mixture, mode):
    policy = ContextFreeSchedule([0.4] * MAX_STEPS)
    env = gym.make_vec("TimePredictionMDP-v0", num_envs=4, model=mixture, max_steps=MAX_STEPS, autoreset_mode=mode)
    for algorithm in (DDPOSF, DDPOIS, GRPO, RLOO, DPOK):
        with pytest.raises(ValueError, match=f'autoreset_mode="DISABLED", got {AutoresetMode[mode].name}'):
            algorithm(policy, env)
    for algorithm in ALGORITHMS:
        make(algorithm, mixture, env=make_env(mixture, autoreset_mode=mode))


# Runs


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_is_deterministic_in_the_seed(mixture, algorithm):
    runs = [make(algorithm, mixture, n_epochs=1).learn(24, log_interval=0) for _ in range(2)]
    other = make(algorithm, mixture, n_epochs=1, seed=4).learn(24, log_interval=0)
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    assert not torch.equal(weights(runs[0]), weights(other))
    assert runs[0].num_timesteps == 24
    assert (runs[0].iteration, runs[0].reward_queries, runs[0].num_updates) == (2, 8, 4)


@pytest.mark.parametrize("adaptation", [FULL, LoRA()], ids=["full", "lora"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_loaded_run_goes_on_exactly_where_it_was(mixture, algorithm, adaptation, tmp_path):
    def start():
        own = {"advantages": PerPrompt(8, 1)} if algorithm in (DDPOSF, DDPOIS, DiffusionNFT) else {}
        return make(algorithm, mixture, adaptation=adaptation, **own)

    uninterrupted = start().learn(36, log_interval=0)
    first = start().learn(12, log_interval=0)
    first.save(tmp_path / "run")
    second = algorithm.load(tmp_path / "run", make_env(mixture))
    assert second.hyperparameters() == first.hyperparameters()
    assert torch.equal(weights(first), weights(second))
    second.learn(24, log_interval=0, reset_num_timesteps=False)
    assert (second.num_timesteps, second.iteration, second.reward_queries) == (36, 3, 12)
    assert torch.equal(weights(uninterrupted), weights(second))


def test_a_loaded_run_on_times_goes_on_exactly_where_it_was(mixture, tmp_path):
    def start():
        return times_learner(mixture, n_epochs=2, batch_size=2, optimizer=AdamW(epsilon=1e-6))

    whole = start().learn(1, log_interval=0)
    whole.learn(1, log_interval=0, reset_num_timesteps=False)
    first = start().learn(1, log_interval=0)
    first.save(tmp_path / "run")
    again = RLOO.load(tmp_path / "run", first.env)
    assert type(again.policy) is ContextFreeSchedule
    assert again.hyperparameters() == first.hyperparameters()
    again.learn(1, log_interval=0, reset_num_timesteps=False)
    assert (again.iteration, again.num_timesteps) == (2, whole.num_timesteps)
    assert torch.equal(weights(whole), weights(again))
    with pytest.raises(ValueError, match="is a run of RLOO, not of DDPOSF"):
        DDPOSF.load(tmp_path / "run", first.env)


def test_hyperparameters_survive_a_checkpoint(mixture, tmp_path):
    given = {
        "clip_range": 3e-4,
        "n_epochs": 2,
        "steps": Steps(fraction=0.5, window=Window(1, within=(0, 2))),
        "advantages": PerPrompt(clip=None),
        "kl": KL(0.1, place="reward", target=0.5, horizon=3.0),
        "optimizer": AdamW(betas=(0.8, 0.9), warmup_updates=2, ema_decay=0.9),
        "log": Log(images=2, x_axis="reward_queries"),
        "stop_kl": 0.3,
        "log_prob_reduction": "sum",
    }
    make(DDPOIS, mixture, **given).save(tmp_path / "run.zip")
    again = DDPOIS.load(tmp_path / "run.zip", make_env(mixture))
    assert (tmp_path / "run").is_dir()
    assert {name: getattr(again, name) for name in given} == given
    assert again.seed == 3
    sizes = {"n_epochs": 3, "rollouts": Rollouts(samples=np.int64(8)), "batch_size": None}
    make(DDPOSF, mixture, **sizes).save(tmp_path / "sf")
    again = DDPOSF.load(tmp_path / "sf", make_env(mixture, num_envs=2))
    assert (again.n_epochs, again.sizes.samples, again.sizes.batch) == (3, 8, 8)
    with pytest.raises(ValueError, match="is a run of DDPOIS, not of DDPOSF"):
        DDPOSF.load(tmp_path / "run", make_env(mixture))
    with pytest.raises(FileNotFoundError, match="no saved run"):
        DDPOIS.load(tmp_path / "nothing", make_env(mixture))


def test_sizes_may_be_others_after_a_load(mixture, tmp_path):
    make(RLOO, mixture).save(tmp_path / "run")
    wider = make_env(mixture, num_envs=16)
    again = RLOO.load(tmp_path / "run", wider, rollouts=Rollouts(group_size=8), batch_size=8, learning_rate=1e-3)
    assert (again.sizes.samples, again.sizes.batch, again.sizes.group, again.learning_rate) == (16, 8, 8, 1e-3)


# Algorithms of one's own


@dataclass(kw_only=True, eq=False, repr=False)
class Scaled(PolicyGradient):
    """REINFORCE with advantages times a factor: a field of its own."""

    advantages: Groups = Groups()
    factor: float = 2.0

    def surrogate(self, log_prob, old_log_prob, advantages) -> Surrogate:
        return score_function_surrogate(log_prob, self.factor * advantages)


class WithoutField(Scaled):
    """Has an argument that is no field."""

    def __init__(self, policy, env, *, offset=0.0, **fields):
        super().__init__(policy, env, **fields)
        self.offset = offset


class PassesOn(Scaled):
    """Has a constructor, and no arguments of its own."""

    def __init__(self, policy, env, **fields):
        super().__init__(policy, env, **fields)


def test_a_field_of_an_algorithm_of_ones_own_is_saved(mixture, tmp_path):
    parameters = inspect.signature(Scaled).parameters
    assert parameters["factor"].kind is inspect.Parameter.KEYWORD_ONLY
    whole = make(Scaled, mixture, factor=0.5).learn(24, log_interval=0)
    first = make(Scaled, mixture, factor=0.5).learn(12, log_interval=0)
    first.save(tmp_path / "run")
    again = Scaled.load(tmp_path / "run", make_env(mixture))
    assert (again.factor, again.advantages) == (0.5, Groups())
    again.learn(12, log_interval=0, reset_num_timesteps=False)
    assert torch.equal(weights(again), weights(whole))


def test_an_argument_that_is_no_field_is_refused_by_save(mixture, tmp_path):
    learner = make(WithoutField, mixture, offset=1.0)
    with pytest.raises(TypeError, match=r"WithoutField .* without its own arguments \['offset'\]: make them fields"):
        learner.save(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    make(PassesOn, mixture, factor=0.5).save(tmp_path / "run")
    assert PassesOn.load(tmp_path / "run", make_env(mixture)).factor == 0.5


# The learning rate


def test_learning_rate_schedule(mixture, tmp_path):
    """It sees the progress after each rollout, as in SB3's PPO: half, then none is left."""
    learner = make(DDPOIS, mixture, learning_rate=lambda remaining: 1e-4 * remaining)
    rates = []
    watch = Watch(lambda model: rates.append(model.updates.optimizer.param_groups[0]["lr"]))
    learner.learn(24, watch, log_interval=0)
    assert rates[1] == pytest.approx(0.5e-4)
    assert learner.updates.optimizer.param_groups[0]["lr"] == 0
    learner.save(tmp_path / "run")
    with pytest.raises(ValueError, match="give it again"):
        DDPOIS.load(tmp_path / "run", make_env(mixture))
    assert DDPOIS.load(tmp_path / "run", make_env(mixture), learning_rate=1e-5).updates.learning_rate == 1e-5


def test_learning_rate_warms_up_over_the_first_updates_and_a_loaded_run_goes_on(mixture, tmp_path):
    rates = []
    watch = Watch(lambda model: rates.append(model.updates.learning_rate))
    learner = make(DDPOIS, mixture, learning_rate=3e-4, optimizer=AdamW(warmup_updates=3), batch_size=4)
    learner.learn(2 * 12, watch, log_interval=0)
    learner.save(tmp_path / "run")
    resumed = DDPOIS.load(tmp_path / "run", make_env(mixture))
    resumed.learn(2 * 12, watch, log_interval=0, reset_num_timesteps=False)
    assert rates == pytest.approx([1e-4, 2e-4, 3e-4, 3e-4])


@pytest.mark.parametrize("wrong", [float("nan"), -1.0])
def test_what_a_schedule_returns_is_checked(mixture, wrong):
    learner = make(RWR, mixture, learning_rate=lambda remaining: wrong if remaining < 1 else 0.1)
    with pytest.raises(ValueError, match=f"learning_rate must be a finite number .*, got {wrong}"):
        learner.learn(24, log_interval=0)


# Stable-Baselines3's manners


def test_logs_have_sb3s_names_and_an_image_grid(mixture, tmp_path):
    make(DDPOIS, mixture, tensorboard_log=str(tmp_path)).learn(24, tb_log_name="run")
    events = EventAccumulator(str(tmp_path / "run_1"), size_guidance={"images": 0})
    events.Reload()
    expected = {
        "rollout/ep_rew_mean", "rollout/ep_len_mean", "train/approx_kl", "train/clip_fraction", "train/loss",
        "train/learning_rate", "train/n_updates", "time/fps", "time/reward_queries", "rollout/reward/brightness",
    }  # fmt: skip
    assert expected <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("time/reward_queries")] == [4, 8]
    assert [event.step for event in events.Scalars("rollout/ep_rew_mean")] == [12, 24]
    assert len(events.Images("images/samples")) == 2


def test_verbose_prints_the_table(mixture, capsys):
    make(DDPOIS, mixture, verbose=1).learn(12)
    assert "ep_rew_mean" in capsys.readouterr().out


def test_lengths_are_counted_and_logged(mixture, tmp_path):
    learner = times_learner(mixture, samples=8)
    learner.set_logger(configure(str(tmp_path), ["json"]))
    learner.learn(1)
    learner.logger.close()
    (line,) = map(json.loads, (tmp_path / "progress.json").read_text().splitlines())
    assert line["rollout/ep_len_mean"] == pytest.approx(learner.num_timesteps / 8)
    assert line["time/total_timesteps"] == learner.num_timesteps < 8 * MAX_STEPS
    for name in ("approx_kl", "clip_fraction", "grad_norm", "loss"):
        assert np.isfinite(line[f"train/{name}"])


def test_callbacks_see_every_step_and_can_stop(mixture):
    class Spy(BaseCallback):
        calls = ()

        def _on_rollout_start(self):
            self.calls += ("start",)

        def _on_rollout_end(self):
            assert self.locals["returns"].shape == (4,)
            self.calls += ("end",)

        def _on_step(self):
            return self.num_timesteps < 20

    spy = Spy()
    learner = make(DDPOSF, mixture)
    learner.learn(1000, callback=spy)
    assert spy.num_timesteps == 20
    assert learner.num_timesteps == 12  # what was not learnt from is not counted
    assert spy.calls == ("start", "end", "start")
    assert learner.iteration == 1
    seen = []
    learner.learn(12, callback=lambda locals_, globals_: seen.append(1) or True)
    assert len(seen) == 3


def test_checkpoint_callback_in_the_middle_of_a_rollout_resumes_exactly(mixture, tmp_path):
    callback = CheckpointCallback(save_freq=5, save_path=str(tmp_path))
    whole = make(DDPOIS, mixture).learn(24, callback=[callback], log_interval=0)
    resumed = DDPOIS.load(tmp_path / "rl_model_20_steps", make_env(mixture))  # saved in the second rollout
    assert (resumed.num_timesteps, resumed.iteration, resumed.reward_queries) == (12, 1, 4)
    resumed.learn(12, log_interval=0, reset_num_timesteps=False)
    assert torch.equal(weights(whole), weights(resumed))


def test_a_run_saved_at_the_end_of_a_rollout_counts_it_once(mixture, tmp_path):
    class Save(BaseCallback):
        def _on_rollout_end(self):
            self.model.save(tmp_path / "run")

        def _on_step(self):
            return True

    make(DDPOIS, mixture).learn(12, Save(), log_interval=0)
    resumed = DDPOIS.load(tmp_path / "run", make_env(mixture))
    assert (resumed.num_timesteps, resumed.reward_queries, resumed.iteration) == (0, 0, 0)


def test_progress_bar(mixture, capsys):
    make(DDPOIS, mixture).learn(12, progress_bar=True)
    assert "12/12" in "".join(capsys.readouterr())


def test_predict_answers_both_environments(mixture):
    learner = make(DDPOIS, mixture)
    observation, _ = learner.env.reset(seed=0)
    actions, state = learner.predict(observation, deterministic=True)
    assert state is None
    assert actions.shape == (4, *mixture.latent_shape)
    single = gym.make("DenoisingMDP-v0", model=mixture, num_steps=3)
    alone, _ = single.reset(seed=0)
    action, _ = learner.predict(alone, deterministic=True)
    assert isinstance(action, np.ndarray)
    np.testing.assert_allclose(action, actions[0].numpy(), atol=1e-4)
    single.step(action)


def test_sb3_evaluates_policies(mixture):
    def make_single():
        return Monitor(gym.make("DenoisingMDP-v0", num_steps=3, model=mixture, reward="brightness"))

    judged = make_single()
    learner = make(DDPOIS, mixture)
    returns, lengths = evaluate_policy(learner, judged, n_eval_episodes=2, return_episode_rewards=True)
    assert lengths == [3, 3]
    assert returns[0] != returns[1]
    lanes = DummyVecEnv([make_single] * 2)
    actions, _ = learner.predict(lanes.reset(), deterministic=True)
    assert actions.shape == (2, *judged.action_space.shape)
    callback = EvalCallback(judged, eval_freq=3, n_eval_episodes=2, verbose=0)
    with pytest.warns(UserWarning, match="not of the same type"):
        learner.learn(12, callback, log_interval=0)
    assert np.isfinite(callback.last_mean_reward)


def test_sb3s_callback_logs_every_so_many_steps(mixture, capsys):
    make(DDPOIS, mixture, verbose=1).learn(24, LogEveryNTimesteps(4), log_interval=0)
    shown = capsys.readouterr().out
    assert [f"total_timesteps | {steps}" in " ".join(shown.split()) for steps in (4, 8, 12, 24)] == [True] * 4


def test_own_logger_can_be_read_as_csv(mixture, tmp_path):
    learner = make(DDPOIS, mixture)
    learner.set_logger(configure(str(tmp_path), ["csv"]))
    learner.learn(12)
    learner.logger.close()
    header = (tmp_path / "progress.csv").read_text().splitlines()[0].split(",")
    assert "rollout/ep_rew_mean" in header


def test_without_an_average_there_are_no_averaged_weights(mixture):
    learner = make(DDPOIS, mixture)
    with (
        pytest.raises(RuntimeError, match=r"give the algorithm optimizer=AdamW\(ema_decay="),
        learner.averaged_weights(),
    ):
        pass
