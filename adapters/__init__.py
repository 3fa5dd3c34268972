"""Adapters to array frameworks: each knows one framework, the two public functions and their plans, and no attention mathematics."""
