"""Result files: what is in one, reading and writing it, what follows from it, its tables."""
