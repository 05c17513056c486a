"""The door to MosaicML Streaming, and every work-around for it."""
