"""From a row of any common shape to a forest of token tries."""
