"""Shape families of attention: each file finds one in a graph and says what it means."""
