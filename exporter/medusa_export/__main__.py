"""`python -m medusa_export`, which is what `accelerate launch -m` runs."""

from medusa_export.cli import main

main()
