"""What the rest becomes: weights of the neurons that stay, refitted in closed form to make up for those that go."""
