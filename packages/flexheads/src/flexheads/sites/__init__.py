"""Sites: the places in a backbone where adapters act, and the hooks that let them in."""
