"""The log-prob engine: a batch and a model in, log-probabilities and entropies of whole responses out."""
