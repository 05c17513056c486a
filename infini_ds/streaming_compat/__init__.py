"""MosaicML Streaming 0.13, and a repair of each of its defects that this project runs into.

`library` is the only module that imports `streaming`. Every other module holds repairs of one part of it. Where the
defect is known upstream, the repair names the issue; tests/streaming_compat shows each defect in plain streaming, and
fails once upstream has fixed it.
"""
