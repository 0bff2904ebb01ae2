"""The three networks of PixArt-Σ as MindSpore cells: DiT, T5 encoder, VAE. They know nothing of files."""
