"""Scores of noised densities, learned from draws: objectives, training, and the models that come of it."""
