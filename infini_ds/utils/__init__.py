"""Small helpers without a room of their own: errors, progress, random states, locks."""
