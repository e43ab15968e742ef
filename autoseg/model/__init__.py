"""THE MACHINE: networks, losses, inference windows, memory and checkpoints."""
