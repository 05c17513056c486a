"""Metric writers (TensorBoard, JSON lines) and diagnostics of the compressive memory."""
