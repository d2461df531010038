"""Runs of many settings and seeds: planned, trained, measured, tabled and drawn."""
