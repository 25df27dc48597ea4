"""Prompt sets: the texts that an environment draws its episodes' prompts from, each with optional metadata."""

from .base import PromptSet, make_prompts, with_article

__all__ = ["PromptSet", "make_prompts", "with_article"]
