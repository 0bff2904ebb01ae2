"""What makes a network fast on one kind of device, from outside of it."""
