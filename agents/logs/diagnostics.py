"""Diagnostics of a rollout and its updates, as pure functions: ratios, weights, diversity, a table of prompts."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

Metrics = Mapping[str, Tensor]

_COMPARED_PER_PROMPT = 64
_TABLE_ROWS = 64
_PROMPT_LENGTH = 100


def mean_of(updates: Iterable[Metrics]) -> Metrics:
    """Return the mean of each scalar over updates; the least and the greatest of those named …_min and …_max."""
    totals: dict[str, list[Tensor]] = {}
    for metrics in updates:
        for name, value in metrics.items():
            totals.setdefault(name, []).append(value)
    reductions = {"min": torch.amin, "max": torch.amax}
    return {
        name: reductions.get(name.rpartition("_")[2], torch.mean)(torch.stack(values))
        for name, values in totals.items()
    }


def effective_sample_size(weights: Tensor) -> Tensor:
    """Return (Σw)²/Σw², a scalar: the number of equally weighted samples that would say as much."""
    return weights.sum().square() / weights.square().sum()


def ratio_metrics(log_ratios: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the least and greatest ρ = π/π_old of an update, and the share of its N samples that is effective.

        ratio_ess = (Σρ)²/(N·Σρ²): 1 where all ratios are equal, 1/N where one outweighs all others

    Args:
        log_ratios: [M] each: log π − log π_old, as the loss has them (summed or averaged over dimensions).
    """
    all_log_ratios = torch.cat(list(log_ratios))
    # ρ/Σρ in place of ρ: the same share, without overflow.
    share = effective_sample_size(torch.softmax(all_log_ratios, 0)) / len(all_log_ratios)
    return {"ratio_min": all_log_ratios.min().exp(), "ratio_max": all_log_ratios.max().exp(), "ratio_ess": share}


def latent_diversity(latents: Tensor, prompts: np.ndarray) -> Tensor | None:
    """Return the mean distance ‖x_i − x_j‖/√D between samples of one prompt, a scalar; None: no prompt has two.

    It is the mean over the pairs of a prompt, then over the prompts that have a pair. Only the first 64 samples of a
    prompt are compared. In latents that are scaled to unit variance, independent samples are about √2 apart.

    Args:
        latents: [B, ...] x_0.
        prompts: [B] on the host: equal numbers are equal prompts.
    """
    flat = latents.flatten(1).float()
    groups = [np.flatnonzero(prompts == prompt)[:_COMPARED_PER_PROMPT] for prompt in np.unique(prompts)]
    means = [
        torch.pdist(flat[torch.from_numpy(rows).to(flat.device)]).mean() / flat.shape[1] ** 0.5
        for rows in groups
        if len(rows) > 1
    ]
    return torch.stack(means).mean() if means else None


def prompt_table(rewards: np.ndarray, prompts: np.ndarray, texts: Sequence[str]) -> str:
    """Return a Markdown table of each prompt's samples, mean reward and standard deviation, the best prompt first.

    Of more than 64 prompts, the best and the worst 32 are shown; one row stands for the rest.

    Args:
        rewards: [B].
        prompts: [B] indices into `texts`.
        texts: The prompts.
    """
    groups = {int(prompt): rewards[prompts == prompt] for prompt in np.unique(prompts)}
    order = sorted(groups, key=lambda prompt: -groups[prompt].mean())
    rows = [_row(_escaped(texts[prompt]), groups[prompt]) for prompt in order]
    if len(rows) > _TABLE_ROWS:
        half = _TABLE_ROWS // 2
        others = np.concatenate([groups[prompt] for prompt in order[half:-half]])
        rows[half:-half] = [_row(f"*{len(rows) - _TABLE_ROWS} prompts between*", others)]
    return "\n".join(["| prompt | samples | mean reward | std |", "|:--|--:|--:|--:|", *rows])


def _row(label: str, rewards: np.ndarray) -> str:
    std = f"{rewards.std():.3g}" if len(rewards) > 1 else "–"
    return f"| {label} | {len(rewards)} | {rewards.mean():.4g} | {std} |"


def _escaped(text: str) -> str:
    text = " ".join(text.split())
    text = text if len(text) <= _PROMPT_LENGTH else text[: _PROMPT_LENGTH - 1] + "…"
    return re.sub(r"([\\`*_{}\[\]|])", r"\\\1", html.escape(text, quote=False))
