"""Whole episodes of a vector environment: how they begin, are collected, kept and read."""
