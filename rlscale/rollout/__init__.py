"""Rollouts: an engine interface, vLLM and a reference engine behind it, and the Ray actor that holds one."""
