"""Texts + label space -> soft labels."""
