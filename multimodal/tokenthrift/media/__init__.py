"""Files to tensors, written once for all systems.

`audio`: any common container and codec to mono samples, whole or as a stream. `suffixes`: what media files are called.
"""
