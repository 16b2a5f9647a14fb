"""Any reducer and any family that `attach` knows, inside evaluation harnesses: lmms-eval and VLMEvalKit."""
