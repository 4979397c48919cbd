"""What the loader of a training takes of the host's memory, known before."""
