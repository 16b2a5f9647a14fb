"""The commands of `tokenthrift`, one file each; `arguments` is what they share.

A command is a function that takes its arguments and returns an exit code: 0 done, 1 something failed, 2 wrong usage or
a path that leads nowhere. Its parser imports nothing heavy, so that `--help` and a wrong option are answered at once.
"""
