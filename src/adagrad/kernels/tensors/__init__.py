"""What is particular to torch tensors: their checks, views of unusual ones as ordinary ones, and versions."""
