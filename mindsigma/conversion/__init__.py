"""Translation of checkpoints between this project, diffusers and the official code, tensor by tensor."""
