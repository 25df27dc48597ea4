"""Stable-Baselines3's callbacks, as `learn` takes them."""

from collections.abc import Callable, Sequence
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback

MaybeCallback = BaseCallback | Sequence[BaseCallback] | Callable[[dict[str, Any], dict[str, Any]], bool] | None


class _ProgressBar(ProgressBarCallback):
    """SB3's, but for the steps of all processes, and only those that were taken."""

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._shown = self.model.num_timesteps

    def _on_step(self) -> bool:
        self.pbar.update(self.num_timesteps - self._shown)
        self._shown = self.num_timesteps
        return True


def as_callback(callback: MaybeCallback, *, progress_bar: bool) -> BaseCallback:
    """Return one callback of what `learn` was given, with a progress bar if asked for."""
    if isinstance(callback, Sequence):
        callback = CallbackList(list(callback))
    elif callback is None:
        callback = CallbackList([])
    elif not isinstance(callback, BaseCallback):
        callback = ConvertCallback(callback)
    return CallbackList([callback, _ProgressBar()]) if progress_bar else callback
