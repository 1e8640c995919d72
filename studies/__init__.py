"""The paper's claims and ours, measured: study programs, and the criteria and pictures that only they use."""
