"""What is particular to torch tensors: their checks, and views of unusual ones as ordinary ones."""
