"""`remap-head`: a reward or critic head of any trainer becomes that of another."""
