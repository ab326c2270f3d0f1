"""Timings against peers on GPUs."""
