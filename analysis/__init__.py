"""Scores, comparisons and pictures of runs and data."""
