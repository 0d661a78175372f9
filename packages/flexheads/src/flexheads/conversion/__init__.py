"""Static transformers heads and flexible heads: one rule for each pair, read in both directions."""
