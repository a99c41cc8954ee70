"""Makes the bundled checkpoint: draws the data, trains the model, writes the folder. Start at `train.py`."""
