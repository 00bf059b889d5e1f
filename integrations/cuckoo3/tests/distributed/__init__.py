"""Tests of a main process with several remote nodes, in a network of their own (root only)."""
