"""The comparison with the pretrained model as the training goes, and an end to a training that over-optimises."""

from collections.abc import Sequence
from typing import final

from stable_baselines3.common.callbacks import BaseCallback

from diffusion_gym.rewards import Reward, make_reward

from ..algorithm import Algorithm
from ..policies import Policy
from .measures import FeatureName, Samples, draw_samples, make_features
from .statistics import distance_between, distance_within, probability_of_no_rise


@final
class HeldOutEvaluation(BaseCallback):
    """Compares the policy with the pretrained model, and ends the training when a held-out reward pays for the gain.

    Every `every` iterations both are judged by the trained reward and by one that nothing was trained for, on the same
    held-out seeds. The training over-optimises when, against the evaluation with the best held-out reward so far
    (the pretrained model's is the first), the trained reward is higher *and* the held-out reward lower, each with
    p < `significance` in a one-sided Student's test of the paired differences, a prompt being one observation. When
    that is so at `patience` evaluations in a row the training ends (`stop=True`). The best of several evaluations is
    partly luck: patience is what guards against it.

    Logged as `evaluation/…`: `reward_gain`, `held_out_gain`, `feature_distance`, `kl` (nats along the path), all
    against the pretrained model; `diversity` among images of a prompt; `over_optimised`, evaluations in a row.

    An evaluation takes as long as a rollout of as many images, in the environment of the training, and is counted in
    `time/rollout_seconds`. Many processes each make all of it.

    Args:
        held_out: The held-out reward: a name, or what else `make_reward` takes.
        prompts: On which prompts; None: the environment's.
        samples_per_prompt: Images of each.
        every: Iterations between two evaluations.
        patience: Evaluations in a row.
        significance: The level of each of the two tests, in (0, 0.5).
        stop: End the training, or only log.
        features: What images are compared by, "emoji_scorer" or "latents".

    Attributes:
        best_iteration: Where the held-out reward was best so far: the checkpoint to go back to.
        over_optimised: At how many evaluations in a row the training has over-optimised.

    Raises:
        ValueError: an argument is out of its range, or there is only one prompt; or, when the training starts, the
            environment's reward learns from what it judges.
    """

    def __init__(
        self,
        held_out: str | Reward,
        *,
        prompts: Sequence[str] | None = None,
        samples_per_prompt: int = 2,
        every: int = 4,
        patience: int = 2,
        significance: float = 0.05,
        stop: bool = True,
        features: FeatureName = "latents",
    ) -> None:
        super().__init__()
        if min(samples_per_prompt, every, patience) < 1 or not 0 < significance < 0.5:
            raise ValueError(
                "samples_per_prompt, every and patience must be at least 1 and significance in (0, 0.5); got "
                f"{samples_per_prompt}, {every}, {patience} and {significance}"
            )
        if prompts is not None and len(prompts) < 2:
            raise ValueError(f"a test over prompts needs at least two prompts, got {list(prompts)}")
        self.held_out = make_reward(held_out)
        self.prompts = prompts
        self.samples_per_prompt = samples_per_prompt
        self.every = every
        self.patience = patience
        self.significance = significance
        self.stop = stop
        self.best_iteration = 0
        self.over_optimised = 0
        self._features = make_features(features)

    @property
    def _algorithm(self) -> Algorithm:
        assert isinstance(self.model, Algorithm)
        return self.model

    def _draw(self, policy: Policy, reference: Policy | None) -> Samples:
        env = self._algorithm.env
        prompts = env.unwrapped.prompts.texts if self.prompts is None else self.prompts  # type: ignore[attr-defined]
        return draw_samples(
            env,
            policy,
            prompts=prompts,
            samples_per_prompt=self.samples_per_prompt,
            held_out=self.held_out,
            features=self._features,
            reference=reference,
        )

    def _on_training_start(self) -> None:
        reward = self._algorithm.env.unwrapped.reward  # type: ignore[attr-defined]
        if reward.state_dict():
            raise ValueError(
                f"the reward {reward.name!r} learns from what it judges, so evaluations would change it and could not "
                "be compared: give it its statistics, Normalised(reward, mean=…, std=…)"
            )
        self._reference = self._algorithm.policy.reference()
        self._pretrained = self._best = self._draw(self._reference, None)
        self._evaluated = 0

    def _on_rollout_start(self) -> None:
        iteration = self._algorithm.iteration
        if iteration % self.every == 0 and iteration != self._evaluated:
            self._evaluated = iteration
            self._judge(self._draw(self._algorithm.policy, self._reference))

    _on_training_end = _on_rollout_start

    def _judge(self, now: Samples) -> None:
        """Log an evaluation, and count it if it is worse than the best one in the way that was described."""
        first, best = self._pretrained, self._best
        assert now.held_out is not None
        assert best.held_out is not None
        assert first.held_out is not None
        assert now.kl is not None
        rose = probability_of_no_rise((now.rewards - best.rewards).mean(1)) < self.significance
        fell = probability_of_no_rise((best.held_out - now.held_out).mean(1)) < self.significance
        self.over_optimised = self.over_optimised + 1 if rose and fell else 0
        if now.held_out.mean() > best.held_out.mean():
            self._best, self.best_iteration = now, self._algorithm.iteration
        scalars = {
            "reward_gain": (now.rewards - first.rewards).mean(),
            "held_out_gain": (now.held_out - first.held_out).mean(),
            "feature_distance": distance_between(first.features, now.features).mean(),
            "kl": now.kl.mean(),
            "over_optimised": self.over_optimised,
        }
        if self.samples_per_prompt > 1:
            scalars["diversity"] = distance_within(now.features).mean()
        for name, value in scalars.items():
            self.logger.record(f"evaluation/{name}", float(value))

    def _on_step(self) -> bool:
        return not (self.stop and self.over_optimised >= self.patience)
