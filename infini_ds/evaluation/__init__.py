"""What a trained model does: loss by position, generated text, the report of a run."""
