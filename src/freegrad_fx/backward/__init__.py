"""The implementation of `decoupled` where a rule acts. Independent of individual rules and of graphs."""
