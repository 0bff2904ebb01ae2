"""What the tensors of a network are called elsewhere, as tables that serve both directions."""
