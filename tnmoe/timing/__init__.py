"""Predicted seconds: work over the rates of a device."""
