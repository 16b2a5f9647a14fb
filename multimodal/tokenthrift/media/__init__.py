"""Files to tensors, written once for all systems.

audio      any common container and codec to mono samples, whole or as a stream
image      any common picture to red, green and blue between 0 and 1
files      which files the arguments of a command name
suffixes   what media files are called
"""
