"""Fetches a model's weights to the disk by name, and loads them as a frozen model."""

