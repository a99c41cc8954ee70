"""The GPU's figures, one part a file. A part is given a `Rig` and yields rows as it finds them; it knows no budget."""
