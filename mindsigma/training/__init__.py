"""Training: the compiled step, optimisers, the loop, its checkpoints and what it reports."""
