"""What a backward rule is. Knows no rule by name, and nothing of graphs."""
