"""Soft labels -> better or smaller ones."""
