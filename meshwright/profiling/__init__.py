"""What the model does and what the hardware can do. Imports nothing else of meshwright."""
