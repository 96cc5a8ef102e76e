"""What `decoupled` comes to where a rule acts. Knows no rule by name, and nothing of graphs."""
