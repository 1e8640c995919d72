"""Experiments on the claims of the paper and of this project, with the criteria and pictures that only they use."""
