"""A bundle on disk: its manifest, its files, and the machine it runs on."""
