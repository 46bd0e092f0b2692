"""Reads checkpoints whose weights are packed in 2 to 8 bits, without the packages that packed them.

Each file knows one published layout. All give the weights back in float32, one at a time, when the loader asks for them.
"""
