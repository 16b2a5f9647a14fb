"""Files to tensors, written once for all systems.

audio      any common container and codec to mono samples, whole or as a stream
           (audio_track: the tracks, on the clock of the file; mixing: several channels to one)
image      any common picture to red, green and blue between 0 and 1
video      any common video to frames with their times, a few, at a rate, or as a stream
           (picture_track: timestamps without decoding; decoders: PyAV and decord)
probe      what a file is and how much of it there is, without decoding
container  a container opened with care, and its second 0 (mp4, matroska: what their structure says)
files      which files the arguments of a command name (kinds: what a file is by its first bytes)
suffixes   what media files are called
errors     what all of them raise
"""
