"""How arrays and lists are read: by compiled code, from Python's own objects, into records for the kernels."""
