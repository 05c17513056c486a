"""From MDS shards to batches: the rows that `data_prep` wrote, streamed, collated, cut into micro-batches."""
