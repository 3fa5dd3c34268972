"""Adapters to array frameworks: each knows one framework, the public functions and their plans; no attention maths."""
