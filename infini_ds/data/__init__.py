"""Prepared data as batches: sources, streams of training and validation rows, and collation."""
