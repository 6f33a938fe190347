"""Mutated model files, and a runner that holds the command line to a clean answer for each."""
