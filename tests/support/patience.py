"""How long tests wait for a process that they started."""

PATIENCE = 300.0  # seconds: several times what the slowest takes on a busy machine, so that only a hang takes longer
