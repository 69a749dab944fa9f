"""What compiled kernels need around them: compiler, cache, memory, threads and interrupts."""
