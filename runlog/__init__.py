"""What a run writes: its folder, its report, its pictures."""
