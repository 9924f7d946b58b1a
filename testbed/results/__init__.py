"""What becomes of a run once it is kept: found again, compared with another, exported, measured against a commit."""
