"""What a student or a teacher knows: swap items, retrieval, the diffusion score, and the statistics of comparisons."""
