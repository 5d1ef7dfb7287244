"""What a run needs, before it is run: `fastsds plan`."""
