"""What is connected: the working graph, the axis algebra, and the groups of neurons that must be cut together."""
