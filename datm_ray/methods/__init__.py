"""Numerics of the methods that make a synthetic set, one folder or module for each. No code here uses disk or Ray."""
