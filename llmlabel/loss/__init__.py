"""Losses as functions of tensors, in float32, and the state that some keep beside the weights."""
