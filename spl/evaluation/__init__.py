<<<<<<< HEAD
"""Trained models looked at: programs that read model folders and samples, and write results."""
=======
"""Evaluations of policies, apart from training: samples, measures, results as JSON lines."""
>>>>>>> 64f0e7a (Results as JSON lines, intervals over prompts and seeds, functions as programs, policies to evaluate)
