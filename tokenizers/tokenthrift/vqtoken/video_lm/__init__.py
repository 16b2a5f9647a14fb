"""Language models that watch: a chat over published checkpoints, their encoders, fine-tuning and its data."""
