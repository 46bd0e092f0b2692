"""What runs in a contestant's own process.

`serve.py` and the modules named `with_…` run as scripts of whatever Python has the contestant's packages, which need not be
ours: they import the standard library, each other, and one package with what comes with it.
"""
