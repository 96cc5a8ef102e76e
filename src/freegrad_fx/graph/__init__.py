"""Questions about the nodes of graphs, and graphs as data. Knows nothing of rules."""
