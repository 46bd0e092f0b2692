"""Makes Medusa heads for a model: training data from its own answers, training, evaluation, and draft n-grams."""
