"""Making Medusa heads for a model: its answers as training data, training, evaluation, and draft n-grams."""
