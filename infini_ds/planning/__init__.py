"""What a run will take: memory, FLOPs, hardware, and whether this node is ready for it."""
