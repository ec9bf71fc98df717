"""What has learnt nothing, or only what a straight line can: the comparisons that stand beside every score."""
