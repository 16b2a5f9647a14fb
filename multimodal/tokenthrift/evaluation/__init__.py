"""Metrics, and tables of quality against tokens: `wer` (word and character error rates of transcripts)."""
