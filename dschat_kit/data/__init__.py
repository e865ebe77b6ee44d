"""Rows in, typed batches out: sources -> prompts -> splits -> pipeline (on disk) -> datasets (tensors)."""
