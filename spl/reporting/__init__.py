"""Reports of results: a page, figures, tables."""
