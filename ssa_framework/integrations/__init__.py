"""Sparse attention inside other libraries; each subpackage needs the extra of its name."""
