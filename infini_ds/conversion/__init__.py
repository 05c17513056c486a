"""Write Hugging Face folders, from ZeRO checkpoints and from GPT-Neo models."""
