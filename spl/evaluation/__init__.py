"""Trained models looked at: programs that read model folders and samples, and write results."""
