"""Tuning: measures the time of steps and the acceptance of drafts, and finds the trees that decode fastest with them."""
