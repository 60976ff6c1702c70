"""What is done without a server: states, fits, judgements, annotations."""
