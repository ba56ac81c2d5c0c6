"""Faster ways to compute what a model's modules compute."""

