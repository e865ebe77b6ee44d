"""DeepSpeed lives here (and is started in train/): engines, generation, checkpoints."""
