"""A run logs into its own folder and no other's."""

import gymnasium as gym
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import DDPOIS, DenoisingPolicy, Log, Rollouts, evaluate
from agents.logs.images import captioned_grid


@pytest.fixture
def make(mixture, tmp_path):
    def make(**options):
        env = gym.make_vec("DenoisingMDP-v0", num_envs=4, num_steps=2, model=mixture, reward="brightness")
        policy = DenoisingPolicy(mixture, seed=0)
        sizes = {"rollouts": Rollouts(samples=4), "batch_size": 4, "seed": 0}
        return DDPOIS(policy, env, **{"tensorboard_log": str(tmp_path / "logs"), **sizes, **options})

    return make


def name_of(learner):
    return learner.logger.dir.rpartition("/")[2]


def test_fresh_runs_have_folders_of_their_own_even_where_they_do_not_reset(make):
    assert [name_of(make().learn(8, reset_num_timesteps=reset)) for reset in (False, False, True)] == [
        "DDPOIS_1",
        "DDPOIS_2",
        "DDPOIS_3",
    ]


def test_a_resumed_run_goes_on_in_its_own_folder(make, tmp_path):
    first = make().learn(8, tb_log_name="foxes")
    first.save(tmp_path / "run")
    make().learn(8, tb_log_name="foxes")
    logs = str(tmp_path / "logs")
    for name in (None, "foxes", "foxes_1"):
        resumed = DDPOIS.load(tmp_path / "run", first.env, tensorboard_log=logs)
        assert name_of(resumed.learn(8, tb_log_name=name, reset_num_timesteps=False)) == "foxes_1"
    resumed = DDPOIS.load(tmp_path / "run", first.env, tensorboard_log=str(tmp_path / "elsewhere"))
    assert name_of(resumed.learn(8, reset_num_timesteps=False)) == "DDPOIS_1"
    assert (
        name_of(DDPOIS.load(tmp_path / "run", first.env, tensorboard_log=logs).learn(8, tb_log_name="owls")) == "owls_1"
    )


def test_a_table_is_printed_with_and_without_a_folder(make, capsys):
    for options in ({}, {"tensorboard_log": None}):
        make(verbose=1, **options).learn(8)
        assert "ep_rew_mean" in capsys.readouterr().out
        make(**options).learn(8)
        assert capsys.readouterr().out == ""


def test_one_writer_writes_a_run_that_goes_on(make, tmp_path):
    learner = make().learn(8)
    logger = learner.logger
    for _ in range(3):
        learner.learn(8, reset_num_timesteps=False)
    assert learner.logger is logger
    assert len(list((tmp_path / "logs").rglob("events*"))) == 1
    learner.learn(8)
    assert name_of(learner) == "DDPOIS_2"


def test_callbacks_dump_the_log_where_the_run_is_on_its_axis(make):
    seen = []
    learner = make(log=Log(x_axis="reward_queries"))
    learner.learn(8)
    for output in learner.logger.output_formats:
        output.write = lambda values, excluded, step: seen.append(step)
    learner.logger.record("eval/mean_reward", 1.0)
    learner.logger.dump(learner.num_timesteps)  # as SB3's EvalCallback does
    assert (seen, learner.num_timesteps) == ([4], 8)


def test_the_environment_counts_what_it_has_rewarded(make):
    learner = make()
    evaluate(learner.env, learner.policy, seeds=range(8))
    assert learner.env.unwrapped.reward_queries == 8
    learner.learn(16)
    assert (learner.reward_queries, learner.env.unwrapped.reward_queries) == (8, 16)


def test_images_of_the_log_are_small_and_can_be_left_out(make, monkeypatch):
    large = captioned_grid(torch.rand(2, 3, 512, 512), [("a", "1"), ("b", "2")])
    assert large.shape[1] < 2 * 320
    pictures = []
    for count in (0, 2):
        learner = make(log=Log(images=count))
        learner.learn(1, log_interval=0)
        for output in learner.logger.output_formats:
            output.write = lambda values, excluded, step: pictures.append("images/samples" in values)
        learner.learn(8, reset_num_timesteps=False)
    assert pictures == [False, True]
