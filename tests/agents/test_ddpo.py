import json
import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback, LogEveryNTimesteps
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import DDPOIS, DDPOSF, RLOO, RWR, Checkpoints, DenoisingPolicy, DiffusionNFT, collect
from agents.advantages import texts_of
from agents.runs.files import replaced_folder
from tests.gradients import assert_gradients_close

ALGORITHMS = [DDPOSF, DDPOIS]
SMALL = {"samples_per_epoch": 4, "batch_size": 2, "learning_rate": 1e-4, "seed": 3}


def make(algorithm, emoji, env, **arguments):
    policy = DenoisingPolicy(emoji, use_lora=True, seed=0)
    return algorithm(policy, env, **{**SMALL, **arguments})


def weights(learner):
    return [p.detach().clone() for p in learner.policy.parameters() if p.requires_grad]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("micro_batch_size", [None, 1, 5])
def test_first_gradient_is_the_policy_gradient(emoji, make_env, algorithm, micro_batch_size, monkeypatch):
    """−1/(B·T) Σ_b A_b Σ_t ∇ log π, against a loop over single transitions."""
    env = make_env(num_envs=4)
    learner = make(algorithm, emoji, env, batch_size=4, micro_batch_size=micro_batch_size, per_prompt_buffer_size=None)
    rollout = collect(env, learner.policy, seeds=[0])
    advantages = (rollout.returns - rollout.returns.mean()) / (rollout.returns.std(correction=0) + 1e-6)
    parameters = [p for p in learner.policy.parameters() if p.requires_grad]
    expected = [torch.zeros_like(p) for p in parameters]
    for step in range(3):
        for lane in range(4):
            k, b = torch.tensor([step]), torch.tensor([lane])
            log_prob = learner.policy.log_prob(rollout.observation(k, b), rollout.action(k, b), "mean")
            for total, gradient in zip(expected, torch.autograd.grad(log_prob.sum(), parameters), strict=True):
                total -= advantages[lane] * gradient / 12
    found = []
    step = learner.optimizer_step
    monkeypatch.setattr(learner, "optimizer_step", lambda: found.extend(p.grad.clone() for p in parameters) or step())
    learner.train(rollout)
    assert_gradients_close(found, expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ratio_is_one_and_nothing_is_clipped_before_the_first_update(emoji, make_env, algorithm, tmp_path):
    learner = make(algorithm, emoji, make_env(), learning_rate=0.0, samples_per_epoch=8, batch_size=4)
    learner.learn(8 * 3, log_interval=0)
    metrics = learner.train(collect(learner.env, learner.policy, seeds=[1]))
    assert float(metrics["approx_kl"]) < 1e-9
    if algorithm is DDPOIS:
        assert float(metrics["clip_fraction"]) == 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_is_deterministic_in_the_seed(emoji, make_env, algorithm):
    runs = [make(algorithm, emoji, make_env()).learn(24, log_interval=0) for _ in range(2)]
    other = make(algorithm, emoji, make_env(), seed=4).learn(24, log_interval=0)
    assert same(weights(runs[0]), weights(runs[1]))
    assert not same(weights(runs[0]), weights(other))
    assert runs[0].num_timesteps == 24
    assert (runs[0].iteration, runs[0].reward_queries, runs[0].num_updates) == (2, 8, 4)


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_loaded_run_goes_on_exactly_where_it_was(emoji, make_env, algorithm, use_lora, tmp_path):
    def start():
        policy = DenoisingPolicy(emoji, use_lora=use_lora, seed=0)
        return algorithm(policy, make_env(), **SMALL, per_prompt_buffer_size=8, per_prompt_min_count=1)

    uninterrupted = start().learn(36, log_interval=0)
    first = start().learn(12, log_interval=0)
    first.save(tmp_path / "run")
    second = algorithm.load(tmp_path / "run", make_env())
    assert same(weights(first), weights(second))
    second.learn(24, log_interval=0, reset_num_timesteps=False)
    assert (second.num_timesteps, second.iteration, second.reward_queries) == (36, 3, 12)
    assert same(weights(uninterrupted), weights(second))


def test_hyperparameters_survive_a_checkpoint(emoji, make_env, tmp_path):
    learner = make(DDPOIS, emoji, make_env(), clip_range=3e-4, n_epochs=2, timestep_fraction=0.5, advantage_clip=None)
    learner.save(tmp_path / "run.zip")
    again = DDPOIS.load(tmp_path / "run.zip", make_env())
    assert (tmp_path / "run").is_dir()
    assert (again.clip_range, again.n_epochs, again.timestep_fraction) == (3e-4, 2, 0.5)
    assert again.advantage_clip is None
    assert again.seed == 3
    make(DDPOSF, emoji, make_env(), n_epochs=3, samples_per_epoch=np.int64(8), batch_size=None).save(tmp_path / "sf")
    again = DDPOSF.load(tmp_path / "sf", make_env(num_envs=2))
    assert (again.n_epochs, again.samples_per_epoch, again.batch_size) == (3, 8, 8)
    with pytest.raises(ValueError, match="is a run of DDPOIS, not of DDPOSF"):
        DDPOSF.load(tmp_path / "run", make_env())
    with pytest.raises(FileNotFoundError, match="no saved run"):
        DDPOIS.load(tmp_path / "nothing", make_env())


def test_learning_rate_schedule(emoji, make_env, tmp_path):
    """It sees the progress after each rollout, as in SB3's PPO: half, then none is left."""
    learner = make(DDPOIS, emoji, make_env(), learning_rate=lambda remaining: 1e-4 * remaining)
    rates = []

    class Watch(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_start(self):
            rates.append(self.model.optimizer.param_groups[0]["lr"])

    learner.learn(24, Watch(), log_interval=0)
    assert rates[1] == pytest.approx(0.5e-4)
    assert learner.optimizer.param_groups[0]["lr"] == 0
    learner.save(tmp_path / "run")
    with pytest.raises(ValueError, match="give it again"):
        DDPOIS.load(tmp_path / "run", make_env())
    assert DDPOIS.load(tmp_path / "run", make_env(), learning_rate=1e-5)._current_learning_rate() == 1e-5


def test_learning_rate_warms_up_over_the_first_updates_and_a_loaded_run_goes_on(emoji, make_env, tmp_path):
    rates = []

    class Watch(BaseCallback):
        def _on_rollout_start(self):
            rates.append(self.model._current_learning_rate())

        def _on_step(self):
            return True

    learner = make(DDPOIS, emoji, make_env(), learning_rate=3e-4, warmup_updates=3, batch_size=4)
    learner.learn(2 * 12, Watch(), log_interval=0)
    learner.save(tmp_path / "run")
    resumed = DDPOIS.load(tmp_path / "run", make_env())
    resumed.learn(2 * 12, Watch(), log_interval=0, reset_num_timesteps=False)
    assert rates == pytest.approx([1e-4, 2e-4, 3e-4, 3e-4])


def test_timestep_fraction_takes_that_share_of_each_trajectory(emoji, make_env):
    learner = make(DDPOIS, emoji, make_env(), timestep_fraction=0.5)
    scored = np.ones((10, 4), dtype=bool)
    scored[9] = False
    steps, lanes = learner._transitions(scored, np.array([0, 2]), np.random.default_rng(0))
    for lane in (0, 2):
        mine = steps[lanes == lane]
        assert len(set(mine.tolist())) == len(mine)
        assert len(mine) in (4, 5)
        assert 9 not in mine
    assert set(lanes) == {0, 2}


@pytest.mark.parametrize("center", [False, True])
def test_centred_advantages_have_mean_zero(emoji, make_env, center):
    learner = make(
        DDPOIS, emoji, make_env(), per_prompt_buffer_size=8, per_prompt_min_count=1, center_advantages=center
    )
    rollout = collect(learner.env, learner.policy, seeds=[0])
    texts = texts_of(rollout.prompt_id, learner.env.unwrapped.prompts)
    learner.per_prompt_stats.update(texts, [-1.0] * 4)  # the reward was lower before
    advantages = learner._advantages(rollout)
    assert (abs(float(advantages.mean())) < 1e-6) is center
    assert advantages.dtype == torch.float32


def test_a_deterministic_policy_cannot_be_trained(emoji, make_env):
    learner = DDPOIS(DenoisingPolicy(emoji, eta=0.0), make_env(), **SMALL)
    with pytest.raises(ValueError, match="give the policy eta > 0"):
        learner.learn(12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples_per_epoch": 6}, r"multiple of the environment's num_envs \(4\), got 6"),
        ({"batch_size": 3}, r"batch_size must divide samples_per_epoch \(4\), got 3"),
        ({"warmup_updates": -1}, "warmup_updates must be an integer of at least 0, got -1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be .*, got -1.0"),
        ({"max_grad_norm": 0}, "max_grad_norm must be .*, got 0"),
        ({"advantage_clip": 0.0}, "advantage_clip must be .*, got 0.0"),
        ({"advantage_clip": float("nan")}, "advantage_clip must be a finite number .*, got nan"),
        ({"micro_batch_size": -1}, "micro_batch_size must be an integer of at least 1, got -1"),
        ({"timestep_fraction": 0.0}, r"timestep_fraction must be a finite number in \(0, 1\], got 0.0"),
        ({"clip_range": 0.0}, "clip_range must be .*, got 0.0"),
        ({"per_prompt_buffer_size": 4}, r"\(4\), got 16; .* per_prompt_min_count"),
    ],
)
def test_wrong_hyperparameters_are_named(emoji, make_env, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(DDPOIS, emoji, make_env(), **arguments)


def test_a_small_timestep_fraction_keeps_one_step(emoji, make_env):
    learner = make(DDPOIS, emoji, make_env(), timestep_fraction=0.01)
    steps, _ = learner._transitions(np.ones((3, 4), dtype=bool), np.array([0, 2]), np.random.default_rng(0))
    assert len(steps) == 2


def test_objects_of_the_wrong_kind_are_named(emoji, make_env):
    with pytest.raises(TypeError, match="policy must be a Policy"):
        DDPOIS("MlpPolicy", make_env(), **SMALL)
    with pytest.raises(TypeError, match="env must be a torch vector environment"):
        DDPOIS(DenoisingPolicy(emoji, use_lora=True), gym.make("DenoisingMDP-v0", model=emoji), **SMALL)
    with pytest.raises(TypeError, match="model must be a DiffusionModel"):
        DenoisingPolicy(make_env())
    with pytest.raises(TypeError, match="sequence of texts"):
        DenoisingPolicy(emoji, prompts="simple_animals")


def test_logs_have_sb3s_names_and_an_image_grid(emoji, make_env, tmp_path):
    make(DDPOIS, emoji, make_env(), tensorboard_log=str(tmp_path)).learn(24, tb_log_name="run")
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


def test_verbose_prints_the_table(emoji, make_env, capsys):
    make(DDPOIS, emoji, make_env(), verbose=1).learn(12)
    assert "ep_rew_mean" in capsys.readouterr().out


def test_callbacks_see_every_step_and_can_stop(emoji, make_env):
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
    learner = make(DDPOSF, emoji, make_env())
    learner.learn(1000, callback=spy)
    assert spy.num_timesteps == 20
    assert learner.num_timesteps == 12  # what was not learnt from is not counted
    assert spy.calls == ("start", "end", "start")
    assert learner.iteration == 1
    seen = []
    learner.learn(12, callback=lambda locals_, globals_: seen.append(1) or True)
    assert len(seen) == 3


def test_checkpoint_callback_in_the_middle_of_a_rollout_resumes_exactly(emoji, make_env, tmp_path):
    callback = CheckpointCallback(save_freq=5, save_path=str(tmp_path))
    whole = make(DDPOIS, emoji, make_env()).learn(24, callback=[callback], log_interval=0)
    resumed = DDPOIS.load(tmp_path / "rl_model_20_steps", make_env())  # saved in the second rollout
    assert (resumed.num_timesteps, resumed.iteration, resumed.reward_queries) == (12, 1, 4)
    resumed.learn(12, log_interval=0, reset_num_timesteps=False)
    assert same(weights(whole), weights(resumed))


def test_a_run_saved_at_the_end_of_a_rollout_counts_it_once(emoji, make_env, tmp_path):
    class Save(BaseCallback):
        def _on_rollout_end(self):
            self.model.save(tmp_path / "run")

        def _on_step(self):
            return True

    make(DDPOIS, emoji, make_env()).learn(12, Save(), log_interval=0)
    resumed = DDPOIS.load(tmp_path / "run", make_env())
    assert (resumed.num_timesteps, resumed.reward_queries, resumed.iteration) == (0, 0, 0)


def test_progress_bar(emoji, make_env, capsys):
    make(DDPOIS, emoji, make_env()).learn(12, progress_bar=True)
    assert "12/12" in "".join(capsys.readouterr())


def test_predict_answers_both_environments(emoji, make_env):
    learner = make(DDPOIS, emoji, make_env())
    observation, _ = learner.env.reset(seed=0)
    actions, state = learner.predict(observation, deterministic=True)
    assert state is None
    assert actions.shape == (4, 4, 16, 16)
    single = gym.make("DenoisingMDP-v0", model=emoji, num_steps=3)
    alone, _ = single.reset(seed=0)
    action, _ = learner.predict(alone, deterministic=True)
    assert isinstance(action, np.ndarray)
    np.testing.assert_allclose(action, actions[0].numpy(), atol=1e-4)
    single.step(action)


def make_small(**arguments):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=4, num_steps=3, model="mixture", reward="brightness")
    return DDPOIS(DenoisingPolicy(env.unwrapped.model, seed=0), env, **SMALL, **arguments)


def test_sb3_evaluates_policies():
    def make_single():
        return Monitor(gym.make("DenoisingMDP-v0", num_steps=3, model="mixture", reward="brightness"))

    judged = make_single()
    learner = make_small()
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


def test_sb3s_callback_logs_every_so_many_steps(capsys):
    make_small(verbose=1).learn(24, LogEveryNTimesteps(4), log_interval=0)
    shown = capsys.readouterr().out
    assert [f"total_timesteps | {steps}" in " ".join(shown.split()) for steps in (4, 8, 12, 24)] == [True] * 4


@pytest.mark.parametrize(
    ("algorithm", "num_envs", "arguments", "message"),
    [
        (DDPOIS, 48, {}, r"multiple of .* \(48\), got 256; .* default.*: give samples_per_epoch"),
        (DDPOIS, 4, {"samples_per_epoch": 16}, r"divide samples_per_epoch \(16\), got 64; .* default.*: .* batch_size"),
        (RLOO, 2, {}, r"divide num_envs \(2\), got 4; .* default.*: .* group_size"),
    ],
)
def test_sizes_that_nobody_gave_are_said_to_be_defaults(algorithm, num_envs, arguments, message):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=num_envs, model="mixture", autoreset_mode="DISABLED")
    with pytest.raises(ValueError, match=message):
        algorithm(DenoisingPolicy(env.unwrapped.model), env, **arguments)


@pytest.mark.parametrize("algorithm", [DDPOIS, DDPOSF, RLOO, RWR, DiffusionNFT])
def test_keywords_that_there_are_not_are_named(algorithm):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=4, model="mixture", autoreset_mode="DISABLED")
    wrong = {DDPOSF: "clip_range", RWR: "kl_coefficient", DiffusionNFT: "clip_range"}.get(algorithm, "lr")
    with pytest.raises(TypeError, match=f"^{algorithm.__name__} has no keyword '{wrong}': allowed are ") as error:
        algorithm(DenoisingPolicy(env.unwrapped.model), env, **{wrong: 1})
    allowed = set(re.findall(r"'(\w+)'", str(error.value).partition(":")[2]))
    inherited = {"noise_draws"} if algorithm in (RWR, DiffusionNFT) else {"sde_window"}
    assert {"learning_rate", "seed", *inherited} <= allowed
    assert not {"policy", "own", "options", wrong} & allowed


def test_own_logger_can_be_read_as_csv(emoji, make_env, tmp_path):
    learner = make(DDPOIS, emoji, make_env())
    learner.set_logger(configure(str(tmp_path), ["csv"]))
    learner.learn(12)
    learner.logger.close()
    header = (tmp_path / "progress.csv").read_text().splitlines()[0].split(",")
    assert "rollout/ep_rew_mean" in header


def test_a_failing_save_leaves_the_last_one_whole(emoji, make_env, tmp_path, monkeypatch):
    learner = make(DDPOIS, emoji, make_env())
    learner.save(tmp_path / "run")
    before = json.loads((tmp_path / "run" / "training_state.json").read_text())
    learner.learn(12, log_interval=0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agents.runs.saving.save_optimizer", full)
    with pytest.raises(OSError, match="No space left"):
        learner.save(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "training_state.json").read_text()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    DDPOIS.load(tmp_path / "run", make_env())


def test_a_kill_between_the_two_renames_loses_nothing(emoji, make_env, tmp_path):
    learner = make(DDPOIS, emoji, make_env())
    learner.save(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "run.previous")  # where a kill would leave it
    (tmp_path / "run.partial").mkdir()
    assert DDPOIS.load(tmp_path / "run", make_env()).iteration == 0
    learner.learn(12, log_interval=0)
    learner.save(tmp_path / "run")
    assert DDPOIS.load(tmp_path / "run", make_env()).iteration == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_save_keeps_what_is_not_its_own(emoji, make_env, tmp_path):
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    (run / "notes.txt").write_text("mine")
    learner = make(DDPOIS, emoji, make_env())
    for _ in range(2):
        learner.save(run)
    assert (run / "notes.txt").read_text() == "mine"
    run.rename(tmp_path / "run.previous")  # where a kill after the two renames would leave it
    learner.save(tmp_path / "new")
    (tmp_path / "new").rename(run)
    learner.save(run)
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "evaluation").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    make(DDPOIS, emoji, make_env()).learn(12, Checkpoints(run, every=1), log_interval=0)
    assert DDPOIS.load(run, make_env()).iteration == 0  # the saved run, not the checkpoints beside it


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="notes is a file"), replaced_folder(tmp_path / "notes"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    assert (tmp_path / "notes").read_text() == "mine"


def test_folder_is_replaced_only_when_it_is_whole(tmp_path):
    with replaced_folder(tmp_path / "x") as folder:
        (folder / "file").write_text("one")
        assert not (tmp_path / "x").exists()

    def interrupted():
        with replaced_folder(tmp_path / "x") as folder:
            (folder / "file").write_text("two")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "x" / "file").read_text() == "one"
