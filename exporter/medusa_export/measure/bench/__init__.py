"""`medusa-export bench`: compares bundles with and without Medusa, and with other engines on the same weights.

Every contestant runs in its own process (`process`, `workers/`), gets the same token ids and decodes the same number of tokens.
It is paused while another one is measured. `contest` lets them take turns; `summary` evaluates their answers.
"""
