"""Synthetic clips with questions: scenes, what is asked of them, and a small model that answers."""
