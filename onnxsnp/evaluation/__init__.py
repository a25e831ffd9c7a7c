"""Did it work: agreement, accuracy, latency and cost of a model beside the one it came from."""
