"""Evaluate: exactly what Train exported, against what it started from, on the same held-out rows and prompts.

Read in the order of the data: models, likelihood and generation give answers; metrics and bootstrap make numbers
of them; baselines stand beside; gate decides; page shows.
"""
