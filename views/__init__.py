"""Photos in, camera paths, pictures out."""
