"""From texts to a label space."""
