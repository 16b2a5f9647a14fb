"""Quality against tokens: `wer` (error rates of transcripts), `statistics` (intervals of means), `report` (tables and
plots as files), `cli` (`tokenthrift evaluate SYSTEM`).
"""
