"""The programs that run in a contestant's own process.

`request_loop.py` and the modules named `with_…` run as scripts in the Python that has the contestant's packages, which may not
be ours. So they import only the standard library, each other, and the contestant's package with its dependencies.
"""
