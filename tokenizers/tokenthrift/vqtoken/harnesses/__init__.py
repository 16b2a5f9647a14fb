"""Adapters of evaluation harnesses: lmms-eval and VLMEvalKit."""
