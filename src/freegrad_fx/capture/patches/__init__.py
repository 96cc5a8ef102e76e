"""Temporary replacements in PyTorch while a model is traced, so that the graph contains every effect of the forward.

Every replacement is made by `replaced`, which does not affect other threads. `symbolic` combines the replacements of a
symbolic trace; `export` uses some of them.
"""
