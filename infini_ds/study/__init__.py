"""The study: grids of runs, their evaluation, and one report with its figures."""
