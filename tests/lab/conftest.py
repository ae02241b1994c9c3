"""Fixtures of the lab. These tests need a kernel with ESP and root: ``make lab`` provides both."""
