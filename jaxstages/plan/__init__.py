"""What a recipe takes before it is run: memory, exchanges between devices, time."""
