"""Adapters to array frameworks: each knows one framework and the two public functions, and no attention mathematics."""
