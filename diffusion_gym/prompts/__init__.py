"""Prompt sets: the texts that an environment draws its episodes' prompts from, each with optional metadata."""

from .base import PromptSet, with_article
from .sources import make_prompts, prompts_from_dataset

__all__ = ["PromptSet", "make_prompts", "prompts_from_dataset", "with_article"]
