"""Text in, tokenizer and MDS shards out: `python -m data_prep --source stdlib --out FOLDER`."""
