"""What is replaced in PyTorch while a model is traced, so that nothing of the forward is run once and forgotten.

Every replacement goes through `replaced`, which keeps it from other threads. `symbolic` has all of a symbolic trace;
export takes what it needs.
"""
