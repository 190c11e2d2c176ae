"""From results to pictures: one page, figures for papers, and a table on the terminal. Nothing is measured here."""
