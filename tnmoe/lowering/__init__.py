"""From orders of contraction to a laid-out program; `lower.run_passes` fixes the order of the passes."""
