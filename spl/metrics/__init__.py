"""Measures of diversity and calibration: pure functions, and torchmetrics of fixed size over them."""
