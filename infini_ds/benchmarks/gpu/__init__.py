"""What a machine's GPU gives, in one command: checks of correctness, speed beside other models, where the time goes."""
