"""Gold rows turn probabilities into guarantees."""
