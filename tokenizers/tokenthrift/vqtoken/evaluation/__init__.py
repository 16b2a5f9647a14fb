"""Quality against tokens: reports, baselines, reconstruction, pictures of the clusters and counted operations."""
