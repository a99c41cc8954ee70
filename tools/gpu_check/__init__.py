"""What a machine with a GPU is asked once: do the GPU's tests pass, and how near are its figures to what it can do."""
