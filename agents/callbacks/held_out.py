"""The comparison with the pretrained model during a training, which ends when it over-optimises."""

from collections.abc import Sequence
from typing import final

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from diffusion_gym.rewards import Reward, make_reward

from ..evaluation.measures import FeatureName, Samples, choose_prompts, draw_samples, make_features
from ..evaluation.statistics import distance_between, distance_within, probability_of_no_rise
from ..policies import Policy
from ..training.algorithm import Algorithm


@final
class HeldOutEvaluation(BaseCallback):
    """Compares the policy with the pretrained model, and ends the training when a held-out reward pays for the gain.

    Every `every` iterations both are judged by the trained reward and by one that nothing was trained for, on the same
    held-out seeds. The training over-optimises when, against the evaluation with the best held-out reward so far
    (the pretrained model's at first), the trained reward is higher *and* the held-out reward lower, each with
    p < `significance` in a one-sided Student's test of the paired differences, a prompt being one observation. When
    that is so at `patience` evaluations in a row the training ends (`stop=True`). The best of several evaluations is
    partly luck, against which patience guards.

    Logged as `evaluation/…`: `reward_gain`, `held_out_gain`, `feature_distance`, `kl` (nats along the path, where the
    policy draws), all against the pretrained model; `diversity` among images of a prompt; `over_optimised`, evaluations
    in a row. Each evaluation is an entry of its own, at the step where the weights that it judged were learnt.

    Checkpoints keep its state, so a resumed run is judged as if it had not been interrupted, and a run that it ended
    stays ended: give it another `patience`, or `stop=False`, to go on. With other prompts, another
    `samples_per_prompt` or another held-out reward it is judged anew, from the pretrained model on.

    An evaluation, of which the first is that of the pretrained model before the first update, takes as long as a
    rollout of as many images (by default at most 96), in the environment of the training, and is counted in
    `time/rollout_seconds`. What it asks of the trained reward is counted in `time/evaluation_queries`, apart from the
    training's `time/reward_queries`; of the held-out reward it asks as much. Many processes each make all of it.

    Args:
        held_out: The held-out reward: a name, or another source for `make_reward`.
        prompts: The prompts to evaluate on; None: the environment's.
        max_prompts: The most of the environment's prompts, always the same ones; None: all of them.
        samples_per_prompt: Images of each prompt.
        every: Iterations between two evaluations.
        patience: Over-optimised evaluations in a row that end the training.
        significance: The level of each of the two tests, in (0, 0.5).
        stop: End the training; False: only log.
        features: The features that images are compared by, "emoji_scorer" or "latents".

    Attributes:
        best_iteration: The iteration with the best held-out reward so far: the checkpoint to go back to.
        over_optimised: The number of over-optimised evaluations in a row.

    Raises:
        ValueError: an argument is out of its range, or there is only one prompt; or, when the training starts, the
            environment has only one prompt, or either reward learns from what it judges, or a run goes on with a policy
            that does not know what it was before the training, as only a `DenoisingPolicy` does.
    """

    def __init__(
        self,
        held_out: str | Reward,
        *,
        prompts: Sequence[str] | None = None,
        max_prompts: int | None = 48,
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
        if prompts is not None:
            _require_two(prompts)
        if max_prompts is not None and max_prompts < 2:
            raise ValueError(f"max_prompts must be None or at least 2, for a test over prompts; got {max_prompts}")
        self.held_out = make_reward(held_out)
        self.prompts = prompts
        self.max_prompts = max_prompts
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

    @property
    def _name(self) -> str:
        return f"held_out_evaluation/{self.held_out.name}"

    @property
    def _texts(self) -> Sequence[str]:
        if self.prompts is not None:
            return self.prompts
        texts = self._algorithm.base_env.prompts.texts
        return [texts[row] for row in choose_prompts(len(texts), self.max_prompts or len(texts))]

    def _draw(self, policy: Policy, reference: Policy | None) -> Samples:
        return draw_samples(
            self._algorithm.env,
            policy,
            prompts=self._texts,
            samples_per_prompt=self.samples_per_prompt,
            held_out=self.held_out,
            features=self._features,
            reference=reference,
        )

    def _on_training_start(self) -> None:
        algorithm = self._algorithm
        policy = algorithm.policy
        for reward in (algorithm.base_env.reward, self.held_out):
            if reward.state_dict():
                raise ValueError(
                    f"the reward {reward.name!r} learns from what it judges, so evaluations would change it and could "
                    "not be compared: give it its statistics, Normalised(reward, mean=…, std=…)"
                )
        _require_two(self._texts)
        if algorithm.iteration and not policy.reference_is_free:
            raise ValueError(
                f"after {algorithm.iteration} iterations a {type(policy).__name__} no longer knows what it was before "
                "the training, which HeldOutEvaluation compares it with: go on without this callback"
            )
        self._reference = policy.reference()
        self._pretrained = self._draw(self._reference, None)
        if not self._begin():
            self._count_queries()

    def _begin(self) -> bool:
        """Take up a resumed run's state and return True, or begin with the pretrained model as the best."""
        self._evaluated = self.best_iteration = self.over_optimised = 0
        self._best = _scores(self._pretrained)
        state = self._algorithm.callback_states.get(self._name)
        if state is not None and state["prompts"] == list(self._texts) and np.shape(state["best"]) == self._best.shape:
            self._evaluated, self.best_iteration = state["evaluated"], state["best_iteration"]
            self.over_optimised, self._best = state["over_optimised"], np.array(state["best"], dtype=np.float32)
            return True
        if state is None:
            self._remember()
        return False

    def _remember(self) -> None:
        """Keep the state that a resumed run needs, for checkpoints."""
        self._algorithm.callback_states[self._name] = {
            "prompts": list(self._texts),
            "evaluated": self._evaluated,
            "best_iteration": self.best_iteration,
            "over_optimised": self.over_optimised,
            "best": self._best.tolist(),
        }

    def _count_queries(self) -> None:
        """Count an evaluation's images as an uninterrupted run would: repeated ones of a resumed run count once."""
        lanes, count = self._algorithm.env.num_envs, len(self._texts) * self.samples_per_prompt
        self._algorithm.evaluation_queries += -(-count // lanes) * lanes * self._algorithm.processes.count

    def _on_rollout_start(self) -> None:
        iteration = self._algorithm.iteration
        if iteration % self.every == 0 and iteration != self._evaluated:
            self._evaluated = iteration
            self._count_queries()
            self._judge(self._draw(self._algorithm.policy, self._reference))

    _on_training_end = _on_rollout_start

    def _judge(self, now: Samples) -> None:
        """Log an evaluation, and count it if it is over-optimised against the best one."""
        pretrained, scores = _scores(self._pretrained), _scores(now)
        rose, fell = (
            probability_of_no_rise(differences.mean(1)) < self.significance
            for differences in (scores[0] - self._best[0], self._best[1] - scores[1])
        )
        self.over_optimised = self.over_optimised + 1 if rose and fell else 0
        if scores[1].mean() > self._best[1].mean():
            self._best, self.best_iteration = scores, self._algorithm.iteration
        self._remember()
        scalars = {
            "reward_gain": (scores[0] - pretrained[0]).mean(),
            "held_out_gain": (scores[1] - pretrained[1]).mean(),
            "feature_distance": distance_between(self._pretrained.features, now.features).mean(),
            "over_optimised": self.over_optimised,
        }
        if now.kl is not None:
            scalars["kl"] = now.kl.mean()
        if self.samples_per_prompt > 1:
            scalars["diversity"] = distance_within(now.features).mean()
        if self._algorithm.processes.is_main:
            for name, value in scalars.items():
                self.logger.record(f"evaluation/{name}", float(value))
            self._algorithm.dump_logs()

    def _on_step(self) -> bool:
        return not (self.stop and self.over_optimised >= self.patience)


def _require_two(prompts: Sequence[str]) -> None:
    if len(prompts) < 2:
        raise ValueError(f"a test over prompts needs at least two prompts, got {list(prompts)}")


def _scores(samples: Samples) -> np.ndarray:
    """Return the rewards and the held-out rewards, [2, P, K]."""
    assert samples.held_out is not None
    return np.stack([samples.rewards, samples.held_out])
