"""Helpers without a room of their own: errors, logging, progress, random states, atomic writes, hashes, locks."""
