"""`medusa-export bench`: bundles against themselves without Medusa, and against other engines on the same weights.

Every contestant lives in a process of its own (`process`, `workers/`), decodes the same token ids to the same number of new
ones, and is stopped while another one is measured. `contest` lets them take turns, `summary` says what came out.
"""
