"""Tuning: what steps cost on this machine, which drafts are accepted, and so which trees give the most tokens a second."""
