"""What long jobs share, whatever they do: files that survive a crash, one writer, signals, workers on a cluster.

journal    what was done, durable files, and the lock of an output folder
keys       what identifies a piece of work
stopping   signals and failures that end a job after the batch in hand
on_ray     the same work on a Ray cluster
"""
