"""Distributed environment, parallel dimensions, collectives, signals, rendezvous check, entry point of scripts."""
