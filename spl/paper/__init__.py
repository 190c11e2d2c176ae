"""The paper's evidence, from training to the report."""
