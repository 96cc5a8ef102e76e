"""What a backward rule is. Does not know any rule by name, and does not know graphs."""
