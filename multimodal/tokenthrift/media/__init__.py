"""Files to tensors, written once for all systems.

audio      any common container and codec to mono samples, whole or as a stream
image      any common picture to red, green and blue between 0 and 1
video      any common video to frames with their times, a few, at a rate, or as a stream
           (picture_track: timestamps without decoding; decoders: decord and PyAV; mp4: rotation)
files      which files the arguments of a command name
suffixes   what media files are called
"""
