"""The pages on prediction heads, sentence by sentence."""
