"""Numeric operations, each with several implementations. An op's folder holds everything about it."""
