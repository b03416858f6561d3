"""Reward models: what scores an image, and how such models are trained."""
