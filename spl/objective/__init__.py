"""The mathematics of Soft Preference Learning: pure functions of log-probabilities."""
