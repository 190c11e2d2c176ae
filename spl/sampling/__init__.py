"""Samples from a model."""
