"""What makes the networks fast; the method does not know it."""
