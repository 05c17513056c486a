"""Text to a tokenizer and MDS shards: `python -m data_prep --source stdlib --out FOLDER`."""
