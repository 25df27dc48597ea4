"""`check_vector_env` lets Gymnasium's own vector environments pass, and says what it cannot check of them."""

import gymnasium as gym
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from diffusion_gym.testing import check_vector_env
from tests.diffusion_gym.testing.walk import Walk

IDS = {
    "CartPole-v1": {},
    "Pendulum-v1": {"max_episode_steps": 10},
    "Acrobot-v1": {"max_episode_steps": 10},
    "MountainCarContinuous-v0": {"max_episode_steps": 10},
    "FrozenLake-v1": {},
    "Blackjack-v1": {},
    "Taxi-v4": {"max_episode_steps": 10},
    "CliffWalking-v1": {"max_episode_steps": 10},
}
TAKES_THE_MASK = {"the caller's options are left alone": "reset takes reset_mask out of them"}
SINGLE = "the single environment does the same, final observation and info too"
NEXT_EPISODE = "an episode after autoreset is as one after a reset"


def make(env_id, mode, kind="sync", **options):
    vector = {"autoreset_mode": mode}
    return gym.make_vec(env_id, 3, vectorization_mode=kind, vector_kwargs=vector, **IDS[env_id], **options)


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("env_id", IDS)
def test_sync_vector_env_passes(env_id, mode):
    report = check_vector_env(make(env_id, mode))
    assert report.weaknesses == TAKES_THE_MASK | {
        "closing": "reset after close() does not raise ClosedEnvironmentError"
    }
    has_a_drawn_start = env_id not in ("FrozenLake-v1", "CliffWalking-v1")
    assert ("seeds" in report.holds) == has_a_drawn_start
    assert SINGLE in report.holds
    is_compared = env_id not in ("FrozenLake-v1", "Blackjack-v1", "Taxi-v4")  # those draw in their steps, or few states
    assert (NEXT_EPISODE in report.holds) == is_compared, str(report)


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_async_vector_env_passes(env_id, mode):
    report = check_vector_env(make(env_id, mode, "async"))
    assert report.weaknesses == TAKES_THE_MASK
    assert report.unchecked == {}


def test_the_natively_vectorised_cart_pole_passes_and_its_weaknesses_are_named():
    """Its lanes share one generator, it takes one seed, and no mask; Gymnasium asks for none of these."""
    report = check_vector_env(gym.make_vec("CartPole-v1", 3))
    assert set(report.weaknesses) == {
        "seeds of lanes",
        "lanes draw from streams of their own",
        "resets of some lanes",
        "closing",
    }
    assert "Seed must be a python integer" in report.weaknesses["seeds of lanes"]
    assert report.unchecked == {SINGLE: "with one seed it starts elsewhere (lane 0)"}
    assert NEXT_EPISODE in report.holds


@pytest.mark.parametrize("mode", AutoresetMode)
def test_buffers_that_gymnasium_reuses_on_request_are_found(mode):
    env = SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 2, copy=False, autoreset_mode=mode)
    with pytest.raises(AssertionError, match="reset, observation: shares memory with observation of the reset before"):
        check_vector_env(env)


def test_a_mask_that_gymnasiums_wrapper_changes_later_is_found():
    """`RecordEpisodeStatistics` hands out the mask that its own reset clears."""
    with pytest.raises(AssertionError, match=r"step \d, info\['_episode'\]: was changed by a later step"):
        check_vector_env(RecordEpisodeStatistics(Walk(AutoresetMode.DISABLED)))
    for mode in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
        check_vector_env(RecordEpisodeStatistics(Walk(mode)))


def test_one_lane_is_said_to_be_compared_with_none():
    report = check_vector_env(gym.make_vec("Pendulum-v1", 1, vectorization_mode="sync", max_episode_steps=5))
    assert report.unchecked == {
        "lanes do not depend on each other": "it has one lane",
        "resets of some lanes": "it has one lane",
    }


def test_a_report_reads_line_by_line():
    lines = str(check_vector_env(gym.make_vec("CartPole-v1", 3))).splitlines()
    assert lines[0] == "CartPoleVectorEnv(CartPole-v1, num_envs=3), NEXT_STEP"
    assert lines[1] == "  holds      spaces"
    assert lines[-1] == f"  unchecked  {SINGLE}: with one seed it starts elsewhere (lane 0)"


def test_strict_makes_errors_of_them():
    with pytest.raises(AssertionError, match=r"(?s)strict, but\nCartPole.*weakness   closing: env.closed is not True"):
        check_vector_env(gym.make_vec("CartPole-v1", 3), strict=True)


def test_what_the_single_environment_does_is_compared():
    """A final observation that is in the space, new and the same in every run is still the wrong one."""

    class Shifts(SyncVectorEnv):
        def step(self, actions):
            *result, info = super().step(actions)
            for final in [row for row in info.get("final_obs", ()) if row is not None]:
                final *= 0.5
            return *result, info

    def make_shifting(num_envs, **options):
        envs = [lambda: gym.make("Pendulum-v1", max_episode_steps=5)] * num_envs
        return Shifts(envs, autoreset_mode=AutoresetMode.SAME_STEP)

    single = gym.spec("Pendulum-v1").entry_point
    gym.register("Shifting-v0", single, vector_entry_point=make_shifting, max_episode_steps=5)
    try:
        with pytest.raises(
            AssertionError, match="step 5, lane 0, observation: a lane must do as the single environment"
        ):
            check_vector_env(gym.make_vec("Shifting-v0", 2))
    finally:
        del gym.registry["Shifting-v0"]
