"""Studies: methods side by side on real data, tuned one by one, with the figures of docs/results.md."""
