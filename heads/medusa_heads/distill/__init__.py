"""Self-distillation: the model answers prompts, and the answers are training data for its heads.

Source: Cai et al., "Medusa", section 2.3.2. Heads must guess what *this* model would say, so its own answers are the right
data whatever their quality, and no other data is needed.
"""
