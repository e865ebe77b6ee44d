"""Hugging Face models as the kit uses them; no DeepSpeed here."""
