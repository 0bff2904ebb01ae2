"""How good pictures are: text read on them, distances between sets of them, agreement with their prompts."""
