"""Evaluations of policies, apart from training: samples, measures, results as JSON lines."""
